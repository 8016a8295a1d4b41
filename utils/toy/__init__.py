"""A small world to align a tiny model in: facts, questions, answers of every quality, and a judge of answers."""
