"""Every work of both sides of the comparisons, at toy size, counts what the workload asks for."""

import dataclasses
import importlib
import importlib.util
import json
import sys

import pytest
import torch

from tests.benchmarks.conftest import FOLDER
from tests.support import world

OURS = [
    "generation",
    "group",
    "ppo",
    "grpo",
    "rloo",
    "sft",
    "reward_model",
    "scoring",
    "scoring_padded",
    "training",
    "training_padded",
    "machine",
]
PEERS = ["generation", "group", "continuous", "ppo", "grpo", "rloo", "sft", "reward_model"]


def expected_tokens(work, size):
    """The tokens that one step of the work has to count."""
    import workload as w

    half, quarter = size.rows // 2, size.rows // 4
    pairs = zip(w.prompts(size, half), w.responses(size, half), strict=True)
    triples = zip(
        w.prompts(size, quarter),
        w.responses(size, quarter),
        w.responses(size, quarter, 4),
        strict=True,
    )
    whole = zip(w.prompts(size, size.rows), w.responses(size, size.rows), strict=True)
    return {
        "ppo": sum(w.response_lengths(size.limit, half)),
        "sft": sum(len(p) + len(r) for p, r in pairs),
        "reward_model": sum(2 * len(p) + len(a) + len(b) for p, a, b in triples),
        "scoring": sum(len(p) + len(r) for p, r in whole),
        "machine": 0,
    }.get(work, sum(w.response_lengths(size.limit, size.rows)))


def test_all_works_are_tested():
    ours, peers, speed = map(importlib.import_module, ("ours", "peers", "speed"))
    assert set(OURS) == set(ours.WORKS) and set(PEERS) == set(peers.WORKS)
    assert {c.work for c in speed.COMPARISONS} < set(OURS)


@pytest.mark.parametrize("work", OURS)
def test_a_work_of_ours_counts_the_tokens_of_the_workload(work):
    import ours
    import workload as w

    size = w.SIZES["tiny"]
    measurement = ours.WORKS[work](size, 1)
    name = "scoring" if work.split("_")[0] in {"scoring", "training"} else work
    assert measurement.tokens == expected_tokens(name, size)
    assert len(measurement.seconds) == 1 and measurement.seconds[0] > 0


def test_a_response_ends_where_the_workload_says():
    import ours
    import workload as w
    from quartet.generation.sampling import Sampling

    size = w.SIZES["tiny"]
    generator = ours.FixedLengthGenerator(w.language_model(size), size, size.rows)
    rollouts = generator.generate(ours.prompts(size, size.rows), Sampling(max_new_tokens=16))
    lengths = w.response_lengths(size.limit, size.rows)
    assert [len(r.response_ids) for r in rollouts] == lengths
    assert all(r.response_ids[-1] == w.EOS for r in rollouts)
    assert all(w.EOS not in r.response_ids[:-1] for r in rollouts)
    for rollout in rollouts:  # as the learner has it, so that it need not compute them again
        ids = torch.tensor([[*rollout.prompt.ids, *rollout.response_ids]])
        logprobs = generator.model(ids).logits.log_softmax(-1)[0, len(rollout.prompt.ids) - 1 : -1]
        theirs = logprobs.gather(-1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.logprobs), theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("work", ["generation", "ppo", "grpo"])
def test_a_model_folder_is_trained_with_an_adapter(work, tmp_path):
    import ours
    import workload as w

    world.model().save_pretrained(tmp_path)
    world.tokenizer().save_pretrained(tmp_path)
    size = dataclasses.replace(w.size_of(str(tmp_path)), rows=8, limit=5)
    assert (size.hidden, size.eos) == (32, world.tokenizer().eos_token_id)
    measurement = ours.WORKS[work](size, 1)
    assert measurement.tokens == 5 * (size.rows // 2 if work == "ppo" else size.rows)
    actor = ours.policy(size)
    trained = [n for n, p in actor.named_parameters() if p.requires_grad]
    assert trained and all("lora" in name for name in trained)
    for ids in w.prompts(size, 3):
        assert w.tokenizer(size)(w.text(size, ids))["input_ids"] == ids


def test_a_size_that_is_neither_a_name_nor_a_folder_is_refused():
    import workload as w

    with pytest.raises(ValueError, match="neither a model folder nor one of 1m"):
        w.size_of("2m")


def test_the_table_of_a_pretrained_model_has_its_own_words_and_targets():
    import speed

    row = {
        "work": "grpo",
        "size": "some-model",
        "peer": "TRL 1.16",
        "seconds": 2.0,
        "peer_seconds": 6.0,
        "ratio": 3.0,
        "ratios_by_round": [3.0],
        "peak_mb": 100.0,
        "peer_peak_mb": 400.0,
    }
    page = "<!-- pretrained --> old <!-- end --> <!-- comparisons --> kept <!-- end -->"
    filled = speed.with_table(page, {"machine": "One.", "comparisons": [row]}, "pretrained")
    assert "| a GRPO step, 4 prompts with 8 answers | some-model |" in filled
    assert "| 2.5 × | 25% |" in filled and " kept " in filled and " old " not in filled


@pytest.mark.parametrize("work", PEERS)
def test_a_work_of_a_peer_counts_the_same_tokens_as_ours(work):
    import peers
    import workload as w

    if package := peers.missing_package(work):
        pytest.skip(f"{package} is not installed")
    if work == "continuous":
        pytest.skip("continuous batching takes all the memory of a machine without a GPU")
    size = dataclasses.replace(w.SIZES["tiny"])
    assert peers.WORKS[work](size, 1).tokens == expected_tokens(work, size)


@pytest.mark.skipif(importlib.util.find_spec("trl") is not None, reason="TRL is installed")
@pytest.mark.slow
def test_a_peer_that_is_not_installed_is_skipped_with_its_name(tmp_path):
    import speed

    with pytest.raises(speed.Skipped, match="trl is not installed"):
        speed.measured(sys.executable, "peers.py", "ppo", "tiny", 1)
    with pytest.raises(speed.Skipped, match="is not there"):
        speed.measured(str(tmp_path / "bin" / "python"), "peers.py", "ppo", "tiny", 1)


@pytest.mark.long
def test_a_comparison_runs_both_sides_in_processes_of_their_own(tmp_path):
    import speed

    comparison = speed.Comparison("training", "tiny", "", "training_padded", 1, 1.0)
    row = speed.compare(comparison, tmp_path, 1)
    assert row["tokens"] > 0 and row["ratio"] > 0


def results_of(seconds, tokens=7):
    return {
        "seconds": seconds,
        "tokens": tokens,
        "optimizer_steps": None,
        "threads": 1,
        "peak_mb": 100.0,
    }


def test_a_comparison_takes_the_medians_and_fills_the_page(tmp_path, monkeypatch):
    import speed

    comparison = speed.Comparison("training", "1m", "", "training_padded", 3, 1.0)
    seconds = {"training": [1.0, 2.0, 9.0], "training_padded": [3.0, 4.0, 5.0]}
    monkeypatch.setattr(speed, "measured", lambda *words: results_of(seconds[words[2]]))
    row = speed.compare(comparison, tmp_path, 2)
    assert row["ratio"] == 2.0 and row["ratios_by_round"] == [2.0, 2.0]
    results = {"machine": "One.", "comparisons": speed.merged([{**row, "work": "scoring"}], row)}
    page = speed.with_table("before <!-- comparisons --> old <!-- end --> after", results)
    assert page.startswith("before <!-- comparisons -->\nOne.\n\n| work |")
    assert page.endswith("<!-- end --> after") and " old " not in page
    assert page.index("scoring 64") < page.index("training on 64")


def test_two_sides_that_count_different_tokens_are_refused(tmp_path, monkeypatch):
    import speed

    def measured(*words):
        return results_of([1.0], tokens=7 if words[2] == "training" else 8)

    monkeypatch.setattr(speed, "measured", measured)
    with pytest.raises(SystemExit, match="do not count the same tokens"):
        speed.compare(
            speed.Comparison("training", "1m", "", "training_padded", 1, 1.0), tmp_path, 1
        )


def test_the_recorded_results_are_of_the_comparisons_that_there_are():
    import speed

    recorded = json.loads(speed.RESULTS.read_text(encoding="utf-8"))["comparisons"]
    assert {(r["work"], r["size"]) for r in recorded} <= {
        (c.work, c.size) for c in speed.COMPARISONS
    }
    assert len(speed.table({"comparisons": recorded}).splitlines()) == len(recorded) + 2


@pytest.mark.parametrize("script", sorted(p.stem for p in FOLDER.glob("*.py")))
def test_importing_a_benchmark_computes_and_prints_nothing(script, capfd, monkeypatch):
    module = importlib.import_module(script)
    assert module.__doc__ and capfd.readouterr() == ("", "")
    if hasattr(module, "main"):
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit, match="0"):
            module.main()
        assert capfd.readouterr().out.startswith("usage: ")
