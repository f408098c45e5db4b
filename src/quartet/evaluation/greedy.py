"""Return the greedy response of the model in a folder to a process that has no torch.

`python -m quartet.evaluation.greedy FOLDER` reads `{"prompt_ids": […], "max_new_tokens": …}` and
writes a JSON string.
"""

import json
import sys

from quartet.experience import Prompt
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.models.language_model import load_model, load_tokenizer, stop_ids
from quartet.models.support import limit_support


def main() -> None:
    folder, question = sys.argv[1], json.load(sys.stdin)
    tokenizer = load_tokenizer(folder)
    model = limit_support(load_model(folder), tokenizer)
    generator = NativeGenerator(model, tokenizer, stop_ids(model, tokenizer), seed=0)
    prompt = Prompt("asked", tuple(question["prompt_ids"]), "")
    greedy = Sampling(max_new_tokens=question["max_new_tokens"], top_k=1)
    json.dump(generator.generate([prompt], greedy)[0].response, sys.stdout)


if __name__ == "__main__":
    main()
