"""Network: what becomes of a model of transformers before it trains: cut, quantised, with adapters or a new head."""
