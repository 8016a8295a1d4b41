"""The forward passes of the decode engine: PyTorch's operations, compiled CPU operations, one call for small models.

Each takes the decoder, whose attributes it reads: weights, tables of the rotary embedding, and the KV cache, which it
extends.

    n   rows that decode together          H   hidden size            D   size of a head
    Q   query heads                        K   key-value heads        G = Q / K
"""
