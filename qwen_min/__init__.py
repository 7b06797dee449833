"""A minimal pure-PyTorch reference implementation of Qwen for text classification.

The names below are the Python interface; command/interface.py has their code.
"""

__all__ = ["Classifier", "build_prompts", "evaluate_predictions", "load", "score_labels"]
__all__ += ["softmax"]


def __getattr__(name: str) -> object:
    # Imported on first use, so that importing `qwen_min.metrics` does not import torch.
    if name in __all__:
        from qwen_min.command import interface

        return getattr(interface, name)
    raise AttributeError(f"module 'qwen_min' has no attribute {name!r}")
