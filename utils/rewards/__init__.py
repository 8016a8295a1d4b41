"""Scores and rewards of answers: the sources of scores, and how a score becomes a reward."""
