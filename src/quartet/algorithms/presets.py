"""Named compositions. Each is a row: the parts, and where they come from."""

from quartet.algorithms.advantages import Gae, GroupMean
from quartet.algorithms.aggregation import SequenceMean, TokenMean
from quartet.algorithms.algorithm import Algorithm
from quartet.algorithms.kl import KLInLoss, KLInReward
from quartet.algorithms.value_loss import ClippedValueLoss

ALGORITHMS: dict[str, Algorithm] = {
    # Schulman et al. 2017 for text as in Ziegler et al. 2019: clip 0.2, λ 0.95, KL in the reward, value weight 0.1.
    "ppo": Algorithm(
        advantage=Gae(),
        kl=KLInReward(),
        aggregation=TokenMean(),
        value_loss=ClippedValueLoss(),
    ),
    # Shao et al. 2024: group advantages, k3 in the loss with 0.04, mean over tokens and then over responses.
    "grpo": Algorithm(
        advantage=GroupMean(),
        kl=KLInLoss(),
        aggregation=SequenceMean(),
    ),
}
