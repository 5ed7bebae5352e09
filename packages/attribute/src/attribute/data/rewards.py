"""Rows weighted by how good they were: Dr. GRPO's advantage, or one that is given.

The policy gradient of a sampled completion is its advantage times the gradient of its log-probability (Liu et al. 2025,
"Understanding R1-Zero-Like Training", section 3.2): advantage = reward − mean reward of the same prompt, divided by no
standard deviation and by no length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from attribute._errors import DataError
from attribute.config import DataConfig


def weights_of(records: Iterable[Mapping[str, Any]], config: DataConfig) -> np.ndarray | None:
    """The weight of each row ``[rows]`` float32, or none where no column is named.

    A row whose reward is NaN is refused, or with ``skip_nan_rewards`` has weight NaN, which leaves it out (see
    :meth:`TokenFile.weigh`), and counts for no mean.

    Raises:
        DataError: a missing column, a value that is no number.
    """
    column = config.reward_column or config.advantage_column
    if not column:
        return None
    values, prompts = list[float](), list[str]()
    for number, record in enumerate(records):
        values.append(_number(record, column, number))
        if math.isnan(values[-1]) and not config.skip_nan_rewards:
            raise DataError(f"row {number}: {column} is NaN (--skip-nan-rewards leaves such rows out)")
        if math.isinf(values[-1]):
            raise DataError(f"row {number}: {column} is infinite")
        prompts.append(_prompt(record, config, number) if config.reward_column else "")
    found = np.array(values, dtype=np.float64)
    if config.advantage_column:
        return found.astype(np.float32)
    known: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, values):
        if not math.isnan(value):
            known.setdefault(prompt, []).append(value)
    means = np.array([np.mean(known.get(prompt, [0.0])) for prompt in prompts])
    return (found - means).astype(np.float32)


def _number(record: Mapping[str, Any], column: str, number: int) -> float:
    if column not in record:
        raise DataError(f"row {number} has no column {column!r}, only {', '.join(record)}")
    value = record[column]
    if value is None:
        return math.nan
    if isinstance(value, bool | int | float):
        return float(value)
    raise DataError(f"row {number}: {column} is {value!r}, not a number")


def _prompt(record: Mapping[str, Any], config: DataConfig, number: int) -> str:
    """What the completions of a group share: the prompt, or a conversation up to its last turn.

    A text that holds prompt and completion undivided needs a column ``prompt`` beside it.
    """
    if config.conversation_column:
        return repr(record[config.conversation_column][:-1])
    column = config.prompt_column if config.completion_column else "prompt"
    if column not in record:
        raise DataError(
            f"row {number} has no column {column!r}: --reward-column compares the completions of a prompt. Name "
            "--prompt-column and --completion-column, or --conversation-column, or give --advantage-column"
        )
    return str(record[column])
