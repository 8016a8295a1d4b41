"""What answers are worth: sources of scores, and what becomes of a score before it is a reward."""
