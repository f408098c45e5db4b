"""Rules about the recipe and the stages in it."""

import json

from quartet.algorithms.preference import PREFERENCES
from quartet.config.rules.base import rule
from quartet.config.tables import Config
from quartet.io.texts import did_you_mean
from quartet.recipes import recipe_names
from quartet.stages.kinds import EVALUATION, KINDS, LABEL, REWARD_MODEL, RL, kind_of
from quartet.stages.rounds import rounds_of

KNOWN_STAGES = (
    "sft, label, reward_model, ilql, custom, evaluation, and what `quartet algorithms` lists"
)


@rule
def recipe_needs_a_stage(config: Config) -> str | None:
    if config.recipe:
        return None
    return f"recipe: is empty. Name one stage or more of {KNOWN_STAGES}."


@rule
def recipe_names_known_stages(config: Config) -> str | None:
    known = [stage for kind in KINDS for stage in kind.stages]
    for stage in config.recipe:
        if stage in recipe_names():
            return (
                f'recipe: "{stage}" is no stage, but a recipe that ships with Quartet: quartet '
                f"init {stage} writes its file. Known are {KNOWN_STAGES}."
            )
        if stage not in known:
            near = did_you_mean(stage, known)
            return f'recipe: "{stage}" is no stage.{near} Known are {KNOWN_STAGES}.'
    return None


@rule
def stages_stand_in_order(config: Config) -> str | None:
    first, *later = rounds_of(config.recipe)
    order = [kind.order for stage in first if (kind := kind_of(stage)) is not None]
    if order != sorted(set(order)):
        by_order: dict[int, str] = {}
        for stage in config.recipe:
            if (kind := kind_of(stage)) is not None:
                by_order.setdefault(kind.order, stage)
        right = json.dumps([by_order[order] for order in sorted(by_order)])
        return (
            f"recipe: {', '.join(config.recipe)}: stages run in the order sft, label, "
            "reward_model, one RL, preference, ilql or custom stage, evaluation, each at most "
            f"once, such as {right}. Only label begins another round, of label, reward_model and "
            "the RL stage."
        )
    kinds = [kind_of(stage) for stage in first[-3:]]
    if not later or (kinds == [LABEL, REWARD_MODEL, RL] and _are_rounds(first[-3:], later)):
        return None
    return (
        "recipe: each round must have the same three stages, label, reward_model and an RL stage, "
        "with sft only before the first and evaluation only behind the last; this one says "
        f"{', '.join(config.recipe)}."
    )


def _are_rounds(stages: tuple[str, ...], rounds: list[tuple[str, ...]]) -> bool:
    """Return whether all rounds have these stages, and the last may have an evaluation."""
    *others, last = rounds
    return all(each == stages for each in others) and last in (stages, (*stages, EVALUATION.name))


@rule
def preference_loss_is_the_stages(config: Config) -> str | None:
    stage, loss = config.preference_stage, config.preference.loss.type
    is_own = loss not in {preset.type for preset in PREFERENCES.values()}
    if stage is None or is_own or loss == PREFERENCES[stage].type:
        return None
    return f'preference.loss.type = "{loss}", but the recipe says "{stage}". Make them the same.'


@rule
def kto_needs_two_comparisons(config: Config) -> str | None:
    if config.preference_stage != "kto" or config.preference.batch_size >= 2:
        return None
    return (
        "preference.batch_size = 1: KTO estimates the KL from answers under other prompts of the "
        "batch, so it must be ≥ 2."
    )


@rule
def evaluation_needs_a_policy(config: Config) -> str | None:
    aligned, given = config.policy_stage, config.evaluation.policy
    if aligned and given is not None:
        return (
            f"evaluation.policy: this run evaluates the policy that {aligned} trains. Leave it "
            'out, or evaluate another with recipe = ["evaluation"].'
        )
    if "evaluation" not in config.recipe or aligned or given is not None:
        return None
    return (
        "recipe: evaluation compares an RL, preference, ilql or custom stage's policy with the one "
        "before it; there is none."
    )


@rule
def evaluation_needs_a_reward(config: Config) -> str | None:
    if "evaluation" not in config.recipe or config.reward or config.data.world is not None:
        return None
    return "recipe: evaluation needs a [[reward]] or a world to say which answers are better."


@rule
def custom_needs_its_table(config: Config) -> str | None:
    if "custom" not in config.recipe or config.custom is not None:
        return None
    return (
        "recipe: the stage custom needs a table [custom] that names its class, such as type = "
        '"mine.py:Mine".'
    )


@rule
def labels_are_for_a_reward_model(config: Config) -> str | None:
    if "label" not in config.recipe or "reward_model" in config.recipe:
        return None
    return "recipe: label leaves comparisons for the stage reward_model; there is none."


@rule
def labels_are_the_reward_models_data(config: Config) -> str | None:
    if "label" not in config.recipe:
        return None
    if config.reward_model.data is not None:
        return (
            "reward_model.data: the reward model is trained on what the stage label leaves. Leave "
            "it out; label.earlier names comparisons to add."
        )
    if config.reward_model.epochs is None:
        return None
    return (
        "reward_model.epochs: how many comparisons the labels give is not known before. Set "
        "reward_model.steps."
    )


@rule
def labels_do_not_exceed_pairs(config: Config) -> str | None:
    label = config.label
    if "label" not in config.recipe or label.labels <= label.pairs:
        return None
    return (
        f"label.labels = {label.labels}: only label.pairs = {label.pairs} pairs are written. Raise "
        "label.pairs."
    )


@rule
def simulated_labels_need_a_gold_reward(config: Config) -> str | None:
    if "label" not in config.recipe or config.label.simulated is None or config.data.world:
        return None
    return (
        "label.simulated: labels are simulated by the gold reward of a world (data.world), and "
        "there is none. Leave it out."
    )


@rule
def labels_are_awaited_by_one_process(config: Config) -> str | None:
    if "label" not in config.recipe or config.launch.processes == 1:
        return None
    return (
        f"launch.processes = {config.launch.processes}: the stage label waits in one process. Run "
        "it and the stages before it with launch.processes = 1."
    )


@rule
def ilql_trains_a_whole_model(config: Config) -> str | None:
    if "ilql" not in config.recipe:
        return None
    policy = config.policy
    remedies = {
        "policy.adapter": (policy.adapter, "an adapter leaves out the head"),
        "policy.quantize": (policy.quantize, "weights in 4 bits leave out the head"),
        "launch.shard": (config.launch.shard, "the heads of Q are not divided between ranks"),
    }
    for key, (value, why) in remedies.items():
        if value:
            return f"{key}: ilql writes its policy as another head of the model, and {why}. " + (
                "Take it out."
            )
    return None


@rule
def ilql_needs_scores(config: Config) -> str | None:
    if "ilql" not in config.recipe or config.data.world != "guess" or config.ilql.data:
        return None
    return "recipe: the world guess has no scores for its conversations. Set ilql.data."
