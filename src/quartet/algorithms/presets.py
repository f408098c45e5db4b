"""Named compositions. Each is a row: the parts that differ from the defaults, and where they come
from. docs/algorithms.md has a section for each, with what the paper's code does otherwise."""

from quartet.algorithms.advantages import AsEstimated, Gae, LengthAdaptiveGae, MonteCarlo, Whiten
from quartet.algorithms.aggregation import FixedLength, SequenceMean, TokenMean
from quartet.algorithms.algorithm import Algorithm
from quartet.algorithms.baselines import (
    BestOfGroup,
    GreedyBaseline,
    GroupMean,
    LeaveOneOut,
    LengthWeightedBaseline,
    ReturnToGo,
)
from quartet.algorithms.by_name import ByName
from quartet.algorithms.entropy import EntropyBonus, EntropyTarget
from quartet.algorithms.groups import DynamicSampling
from quartet.algorithms.imitation import PositiveExamples, Pretraining
from quartet.algorithms.kl import AdaptiveCoef, KLInLoss, KLInReward, NoKL
from quartet.algorithms.policy_loss import (
    Cispo,
    Clip,
    Gmpo,
    ImportanceWeighted,
    KLPenalty,
    Reinforce,
    Sapo,
    SequenceClip,
)
from quartet.algorithms.rewards import ClipScore, LastToken, MissingEos, RunningScale, SoftOverlong
from quartet.algorithms.state_values import MonteCarloValues
from quartet.algorithms.update import TrustRegion
from quartet.algorithms.value_loss import ClippedValueLoss

INF = float("inf")


def with_critic(policy_loss: object, **parts: object) -> Algorithm:
    """PPO's frame, as for text since Ziegler et al. 2019, around another surrogate: the rungs of
    the ladder."""
    frame: dict[str, object] = {
        "advantage": Gae(),
        "normalize": Whiten(),
        "kl": KLInReward(),
        "scores": (ClipScore(),),
        "aggregation": TokenMean(),
        "value_loss": ClippedValueLoss(),
    }
    return Algorithm(policy_loss=policy_loss, **(frame | parts))  # type: ignore[arg-type]


LADDER: dict[str, Algorithm] = {
    # Williams 1992: −V log π, the return alone.
    "reinforce": Algorithm(
        advantage=ReturnToGo(),
        policy_loss=Reinforce(),
        kl=KLInReward(),
        scores=(ClipScore(),),
        aggregation=TokenMean(),
    ),
    # Mnih et al. 2016, synchronous: −A log π.
    "a2c": with_critic(
        Reinforce(),
        value_loss=ClippedValueLoss(clip=INF, coef=1.0),
        entropy=EntropyBonus(coef=0.01),
    ),
    # Schulman et al. 2017, eq. 6: −ρA, without anything that holds it back.
    "importance_weighted": with_critic(ImportanceWeighted()),
    # Schulman et al. 2017, section 4.
    "ppo_penalty": with_critic(KLPenalty()),
    # Schulman et al. 2017 for text as in Ziegler et al. 2019: clip 0.2, λ 0.95, KL in the reward,
    # value weight 0.1.
    "ppo": with_critic(Clip()),
}

TRUST_REGIONS: dict[str, Algorithm] = {
    # Schulman et al. 2015.
    "trpo": with_critic(ImportanceWeighted(), update=TrustRegion()),
    # Kakade 2001.
    "npg": with_critic(ImportanceWeighted(), update=TrustRegion(line_search_steps=0)),
}

CRITIC_FREE: dict[str, Algorithm] = {
    # Shao et al. 2024: group advantages, k3 in the loss with 0.04, mean over tokens and then over
    # responses.
    "grpo": Algorithm(advantage=GroupMean(), kl=KLInLoss(), aggregation=SequenceMean()),
    # Liu et al. 2025: no deviation, no length in the denominator, no KL.
    "dr_grpo": Algorithm(advantage=GroupMean(std="none"), kl=NoKL(), aggregation=FixedLength()),
    # Yu et al. 2025: clip-higher, mean over tokens, groups without signal replaced, soft punishment
    # of length, no KL.
    "dapo": Algorithm(
        advantage=GroupMean(),
        kl=NoKL(),
        aggregation=TokenMean(),
        scores=(SoftOverlong(),),
        policy_loss=Clip(low=0.2, high=0.28),
        groups=DynamicSampling(),
    ),
    # Zheng et al. 2025.
    "gspo": Algorithm(
        advantage=GroupMean(), kl=NoKL(), aggregation=SequenceMean(), policy_loss=SequenceClip()
    ),
    # MiniMax-M1, 2025.
    "cispo": Algorithm(
        advantage=GroupMean(), kl=NoKL(), aggregation=TokenMean(), policy_loss=Cispo()
    ),
    # Gao et al. 2025.
    "sapo": Algorithm(
        advantage=GroupMean(), kl=NoKL(), aggregation=SequenceMean(), policy_loss=Sapo()
    ),
    # Zhao et al. 2025.
    "gmpo": Algorithm(
        advantage=GroupMean(), kl=NoKL(), aggregation=SequenceMean(), policy_loss=Gmpo()
    ),
    # Ahmadian et al. 2024: KL in the reward, one advantage per response, no clip; a response counts
    # as one action.
    "rloo": Algorithm(
        advantage=LeaveOneOut(),
        kl=KLInReward(),
        aggregation=FixedLength(length=1),
        policy_loss=Reinforce(),
    ),
    # Dong et al. 2023: imitate the best of each group.
    "raft": Algorithm(
        advantage=BestOfGroup(), kl=NoKL(), aggregation=SequenceMean(), policy_loss=Reinforce()
    ),
    # Xiong et al. 2025: the same with ratios and a clip, for several updates from one batch.
    "raft_pp": Algorithm(advantage=BestOfGroup(), kl=NoKL(), aggregation=SequenceMean()),
    # Hao et al. 2025: exact on-policy, neither KL nor clip.
    "opo": Algorithm(
        advantage=LengthWeightedBaseline(),
        kl=NoKL(),
        aggregation=FixedLength(length=1),
        policy_loss=Reinforce(),
    ),
    # Hu 2025: no group; returns whitened over the batch.
    "reinforce_pp": Algorithm(
        advantage=ReturnToGo(),
        normalize=Whiten(),
        kl=KLInReward(coef=0.01),
        aggregation=TokenMean(),
    ),
    # Hu et al. 2025: the group's mean as baseline, whitened over the batch; k2 in the loss.
    "reinforce_pp_baseline": Algorithm(
        advantage=GroupMean(std="none"),
        normalize=Whiten(),
        kl=KLInLoss(estimator="k2", coef=0.01),
        aggregation=TokenMean(),
    ),
    # Li et al. 2024: the greedy response's score as baseline.
    "remax": Algorithm(
        advantage=GreedyBaseline(),
        kl=KLInReward(coef=0.05),
        aggregation=FixedLength(length=1),
        policy_loss=Reinforce(),
    ),
    # Kazemnejad et al. 2024: PPO with the mean score of nine continuations for a value.
    "vineppo": Algorithm(
        advantage=MonteCarloValues(),
        normalize=Whiten(),
        kl=KLInLoss(estimator="k3", coef=1e-4),
        aggregation=TokenMean(),
    ),
    # Lu and Thinking Machines Lab 2025: the reference is a teacher, and each token's reward is
    # log π_teacher − log π_old of that token alone.
    "on_policy_distillation": Algorithm(
        advantage=ReturnToGo(gamma=0.0), kl=KLInReward(coef=1.0), aggregation=TokenMean()
    ),
}

WITH_CRITIC: dict[str, Algorithm] = {
    # Yue et al. 2025: length-adaptive λ, Monte Carlo targets, clip-higher, likelihood of right
    # answers, no KL.
    "vapo": Algorithm(
        advantage=LengthAdaptiveGae(),
        kl=NoKL(),
        aggregation=TokenMean(),
        policy_loss=Clip(low=0.2, high=0.28),
        value_loss=ClippedValueLoss(clip=0.5, coef=1.0),
        positives=PositiveExamples(coef=0.1),
    ),
    # OpenAI baselines' ppo2 (Dhariwal et al. 2017): γ 0.99, value weight 0.5, entropy 0.01; there
    # is no reference in games.
    "ppo2": Algorithm(
        advantage=Gae(gamma=0.99),
        normalize=Whiten(),
        kl=NoKL(),
        aggregation=TokenMean(),
        value_loss=ClippedValueLoss(coef=0.5),
        entropy=EntropyBonus(coef=0.01),
    ),
}

SYSTEMS: dict[str, Algorithm] = {
    # Ziegler et al. 2019 and openai/lm-human-preferences.
    "lm_human_preferences": with_critic(
        Clip(),
        kl=KLInReward(coef=0.15, controller=AdaptiveCoef()),
        scores=(),
        rewards=LastToken(whiten=True),
    ),
    # Stiennon et al. 2020; the code of its PPO was not published.
    "summarize_from_feedback": with_critic(Clip(), scores=(MissingEos(replace=True),)),
    # Ouyang et al. 2022: KL 0.02, pretraining texts with 27.8.
    "instructgpt": with_critic(
        Clip(), kl=KLInReward(coef=0.02), scores=(), ptx=Pretraining(coef=27.8)
    ),
    # DeepSpeed-Chat: KL 0.1, scores cut at 5, no whitening, actor and critic each with its own
    # backward pass.
    "deepspeed_chat": with_critic(
        Clip(),
        kl=KLInReward(coef=0.1),
        normalize=AsEstimated(),
        value_loss=ClippedValueLoss(coef=1.0),
    ),
    # TRL up to 1.10, PPOTrainer.
    "trl_ppo": with_critic(Clip(), scores=(), normalize=Whiten(deviation="sample")),
    # CarperAI/trlx.
    "trlx": with_critic(
        Clip(),
        kl=KLInReward(coef=0.001),
        scores=(ClipScore(limit=10.0),),
        normalize=Whiten(deviation="sample"),
        value_loss=ClippedValueLoss(coef=1.0),
    ),
    # Zheng et al. 2023, MOSS-RLHF's PPO-max.
    "moss_ppo_max": with_critic(
        Clip(),
        kl=KLInReward(coef=0.02),
        scores=(RunningScale(), ClipScore(limit=10.0)),
        normalize=Whiten(clip=0.5),
        value_loss=ClippedValueLoss(coef=1.0),
        entropy=EntropyTarget(target=35.0, coef=0.0),
    ),
    # The plain formulas: KL with weight 1, return less value, ρA, loss = actor + 0.1 · critic.
    "minimal": Algorithm(
        advantage=MonteCarlo(),
        kl=KLInReward(coef=1.0),
        aggregation=TokenMean(),
        policy_loss=ImportanceWeighted(),
        value_loss=ClippedValueLoss(clip=INF, coef=0.1),
    ),
}

FAMILIES: dict[str, dict[str, Algorithm]] = {
    "the ladder to PPO": LADDER,
    "trust regions": TRUST_REGIONS,
    "without a critic": CRITIC_FREE,
    "with a critic": WITH_CRITIC,
    "systems": SYSTEMS,
}
ALGORITHMS: dict[str, Algorithm] = ByName(
    {name: a for family in FAMILIES.values() for name, a in family.items()}
)
