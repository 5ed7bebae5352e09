"""Query gradients out of a dataset (reduce), and a dataset scored against them in one pass (score)."""

from attribute.scoring._config import ReduceConfig, ScoreConfig
from attribute.scoring._reduce import reduce_gradients
from attribute.scoring._score import Scored, score_dataset

__all__ = ["ReduceConfig", "ScoreConfig", "Scored", "reduce_gradients", "score_dataset"]
