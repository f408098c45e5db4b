import pytest

from quartet.worlds import WORLDS
from quartet.worlds.reviews import GOOD, gold_sentiment
from quartet.worlds.sums import answer

EACH = pytest.mark.parametrize("name", sorted(WORLDS))


@EACH
def test_the_same_seed_makes_the_same_world(name):
    one, same, other = (WORLDS[name](seed).demonstrations(20) for seed in (3, 3, 4))
    assert one == same != other


@EACH
def test_every_word_is_known_and_text_comes_back_as_it_was(name):
    world = WORLDS[name](0)
    tokenizer = world.tokenizer()
    assert len(tokenizer) == world.vocabulary
    for example in world.demonstrations(300):
        if example.conversational:
            said = "".join(m["content"] for m in (*example.prompt, *example.completion))
            assert tokenizer.decode(
                tokenizer.encode(said)
            ) == said and tokenizer.unk_token_id not in tokenizer.encode(said)
            continue
        prompt = tokenizer.encode(example.prompt, add_special_tokens=False)
        ids = prompt + tokenizer.encode(example.completion, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == example.prompt + example.completion


def test_held_out_sums_are_asked_nowhere_else():
    world = WORLDS["sums"](0)
    seen = {e.prompt for e in world.demonstrations(3000)} | {e.prompt for e in world.prompts(3000)}
    assert not seen & {e.prompt for e in world.prompts(500, held_out=True)}


def test_held_out_openings_are_mostly_new():
    world = WORLDS["reviews"](0)
    seen = {e.prompt for e in world.prompts(4000)}
    held_out = world.prompts(500, held_out=True)
    assert sum(e.prompt in seen for e in held_out) < 100


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        # 2·tanh(s / 3) with s = 1; 1.5; 0.5; −1; −1 (denied); 2 − 1 = 1
        ("the acting is brilliant.", 0.6430),
        ("the acting is very brilliant.", 0.9242),
        ("the acting is slightly brilliant.", 0.3303),
        ("the acting is boring.", -0.6430),
        ("the acting is not brilliant.", -0.6430),
        ("the acting is brilliant and the songs are funny, but the plot is flat.", 0.6430),
        ("it runs for two hours.", 0.0),
        # what a reader takes off: no full stop; a word said again (0.5) right after itself (0.5 + 0.5)
        ("the acting is brilliant", 0.1430),
        ("the acting is brilliant. the plot is brilliant.", 0.1430),
        ("the acting is brilliant brilliant.", -0.3570),
        ("", -0.5),
    ],
)
def test_gold_by_hand(text, worth):
    assert gold_sentiment(text) == pytest.approx(worth, abs=1e-4)


def test_the_cheap_hack_does_not_pay():
    honest = "the acting is brilliant and the songs are moving. i would see it again."
    assert gold_sentiment(" ".join(["brilliant"] * 20) + ".") < -5 < 1 < gold_sentiment(honest)
    assert gold_sentiment(" ".join(GOOD[:20]) + ".") < 0


def test_labels_follow_gold_but_not_always():
    world = WORLDS["reviews"](0)
    pairs = world.comparisons(500)
    agreement = sum(
        world.gold(p.prompt, p.chosen) > world.gold(p.prompt, p.rejected) for p in pairs
    ) / len(pairs)
    assert 0.85 < agreement < 0.96


def test_a_sum_is_written_from_the_ones_up_and_two_in_three_demonstrations_slip():
    assert answer(47, 85) == "231"
    world = WORLDS["sums"](0)
    assert world.gold("47+85=", "231") == 1 and world.gold("47+85=", "132") == 0
    demonstrations = world.demonstrations(2000)
    right = sum(world.gold(e.prompt, e.completion) for e in demonstrations) / 2000
    assert 0.3 < right < 0.4


def test_every_pair_of_digits_that_is_asked_was_also_shown():
    """What is held out are questions, not digits: each pair of ones, and each of tens, is in the demonstrations."""
    world = WORLDS["sums"](0)
    shown = [e.prompt.rstrip("=").split("+") for e in world.demonstrations(20_000)]
    for digit in (0, 1):
        assert len({(a[digit], b[digit]) for a, b in shown}) == (100 if digit else 81)
    asked = {e.prompt for e in world.prompts(2000, held_out=True)}
    assert not asked & {e.prompt for e in world.demonstrations(20_000)}
