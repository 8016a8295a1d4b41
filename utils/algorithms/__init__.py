"""The mathematics of RLHF as pure functions of tensors and floats, independent of models, engines and flags.

Notation used throughout this package:

    B   sequences in a batch
    T   token columns of a right-padded batch (prompt and response together)
    R   response columns, right-padded; column j belongs to the j-th response token

Masks are true where a token counts. They come from lengths and end-of-sequence positions, never from `ids != pad`:
LLaMA is often padded with the EOS token, and then such a comparison removes the very token that ends a response.
Values outside a mask are never read, so NaN or infinity there reaches neither a result nor a gradient.
Half-precision inputs are widened to fp32 before the first subtraction.
"""
