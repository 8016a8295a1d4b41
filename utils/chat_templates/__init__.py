"""Chat templates: the text and the tokens in which a model reads a dialogue, and which of them are an answer."""
