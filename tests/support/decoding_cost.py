"""What a decoded token costs on a pretended GPU."""

from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from tests.support.world import prompts, tokenizer

ROWS = 16


def cost_of_a_token(made, counts):
    """Kernels and host waits of one decoding step of 16 rows: the difference of 40 tokens and 8. `counts` are those of the
    pretended device."""
    generator = NativeGenerator(made, tokenizer(), frozenset({10**6}), 0)

    def cost(tokens):
        counts.reset()
        generator.generate(prompts(ROWS), Sampling(max_new_tokens=tokens))
        return sum(counts.kernels.values()), sum(counts.waits.values())

    cost(4)  # kernels that only a first use takes
    (few, waits_few), (many, waits_many) = cost(8), cost(40)
    return (many - few) / 32, (waits_many - waits_few) / 32
