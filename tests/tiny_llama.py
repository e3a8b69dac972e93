"""The sizes of a tiny Llama and its kin."""

# Weights far larger than usual, so that a wrong position or mask shows in the scores.
TINY_LLAMA = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
