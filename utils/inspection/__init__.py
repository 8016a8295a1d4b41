"""A look at the data of a step before it trains: the counts, some rows as the model sees them, lengths, duplicates."""
