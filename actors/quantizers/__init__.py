"""Makes int4 (and 3- and 8-bit) checkpoints of 16-bit ones: rtn, hqq, awq, gptq, and bits per layer by sensitivity.

Tensors and model directories in, a compressed-tensors directory out. Knows no prompts' files, no command line, no Ray.
`run` walks the layers, `layer_walk` computes them, one file per method rounds them, `checkpoint_writer` writes them.
"""
