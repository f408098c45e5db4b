"""Names of known conventions: choices that papers leave open or that libraries state. A claim says
what each would give; an adapter says which of them its library states, and where."""

CONTIGUOUS = "tokens of others count as states with value 0"
AFTER_THE_END = "the score is one token behind the last one"
ONE_FURTHER = "the value one token behind the last one counts, too"
SAMPLE_DEVIATION = "deviation of the sample (n − 1)"
POPULATION_DEVIATION = "deviation of the population (n)"
SEQUENCE_MEAN = "mean over responses of means over tokens"
TOKEN_MEAN = "mean over all tokens"
WITHOUT_HALF = "without the factor ½"
NOT_PER_RESPONSE = "not divided by the number of responses"
PER_TOKEN = "log-ratios are means over tokens"
PER_PAIR = "mean over pairs, twice the mean over responses"
HELD_AT_20 = "log-ratio held within ±20"
DUAL_CLIP = "dual clip at 3"
CUT_AT_10 = "estimate cut at ±10"
RAW_SCORE = "a group of one keeps its score"
EMPTY_IS_ZERO = "a response without tokens counts as 0"
MEAN_OF_MEANS = "mean of the pieces' own means"
AS_K3 = "k3 as a loss"
AS_K1 = "k1 as a loss"
WITHOUT_RATIO = "the on-policy gradient of k3, without the ratio to the policy that sampled"


def epsilon(eps: float) -> str:
    """Return the name of the convention to divide by a group's deviation + eps."""
    return f"deviation + {eps:g}"
