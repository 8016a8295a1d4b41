"""From rows of token ids to batches."""
