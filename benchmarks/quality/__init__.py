"""Quality of weight quantization at equal real bits: two real models, ours and the peers, one table, one plot."""
