"""Fine-tune Qwen3.5 hybrids and their relatives, losslessly, on a box that its user owns."""

__version__ = "0.1.0"
