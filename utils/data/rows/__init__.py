"""From examples to rows of token ids, prepared once and cached."""
