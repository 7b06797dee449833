"""The fast forms that the commands use; command/plain.py has the definitions under these names."""

from qwen_min.fast.batching import token_budget_batches
from qwen_min.fast.features import head_losses, pooled_features
from qwen_min.fast.generation import generate_answers
from qwen_min.fast.label_scores import label_losses, score_labels
