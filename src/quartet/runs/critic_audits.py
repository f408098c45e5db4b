"""Results of `quartet critic`: read from a run folder, as tables, and in sentences."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter

from quartet.runs.evaluations import EstimateRecord, Table
from quartet.runs.records import Finite, Name, Record, Size, Step, Text
from quartet.runs.untrusted import MAX_DOCUMENT, Folder, Unreadable, checked, parse_json
from quartet.runs.wording import number

FOLDER = "critic_audits"
"""The folder of a run with the results of audits, a file for each step."""
MOST = 50
"""The most audits of a run that are read."""
NOTHING = 5e-6
"""Numbers nearer to 0 are rounding."""
Audit = Mapping[str, Any]


class BinRecord(Record):
    low: Finite
    high: Finite
    states: int
    value: Finite
    mean_return: EstimateRecord


class CalibrationRecord(Record):
    bins: list[BinRecord]
    slope: EstimateRecord | None
    offset: EstimateRecord | None


class PositionRecord(Record):
    first: int
    last: int
    states: int
    value: Finite
    mean_return: Finite
    bias: EstimateRecord
    rmse: EstimateRecord
    deviation: Size


class PartsRecord(Record):
    total: Size
    level: Size
    position: Size
    rest: Size


class VarianceRecord(Record):
    of_expected_returns: Size
    of_single_returns: Size
    explained: Finite | None
    possible: Finite | None
    explained_of_expected: Finite | None


class RightRecord(Record):
    states: int
    deviation: Size | None


class AccuracyRecord(EstimateRecord):
    n: int


class RankingRecord(Record):
    pairs: int
    clear: AccuracyRecord | None
    open: AccuracyRecord | None


class LamRecord(Record):
    lam: Finite
    mean_bias: EstimateRecord
    bias: EstimateRecord
    bias_of_returns: EstimateRecord
    deviation: Size
    error: EstimateRecord
    correlation: Finite | None
    is_best: bool


class AdvantagesRecord(Record):
    units: int
    true_deviation: Size | None
    by_lam: list[LamRecord]


class AuditRecord(Record):
    stage: Name
    step: Step
    states: int = Field(ge=1)
    prompts: int
    continuations: int
    responses: int
    unscored: int
    compared: list[Text]
    gamma: Finite
    lam: Finite | None
    level: EstimateRecord
    rmse: EstimateRecord
    calibration: CalibrationRecord
    positions: list[PositionRecord]
    parts: PartsRecord
    follows: EstimateRecord | None
    variance: VarianceRecord
    where_right: RightRecord
    ranking: RankingRecord
    advantages: AdvantagesRecord


AUDIT = TypeAdapter(AuditRecord)


def critic_audits(run: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the audits of a run's critic by step, the first step first, and a sentence about each
    file that cannot be read. An audit of which an entry is wrong is left out whole."""
    folder, results, problems = Folder(run), [], []
    try:
        names = sorted(n for n in folder.names(FOLDER) if n.endswith(".json"))
    except Unreadable as error:
        return [], [f"{FOLDER} {error}"]
    for name in names[:MOST]:
        try:
            content = folder.read(f"{FOLDER}/{name}", MAX_DOCUMENT)
            value, faults = checked(AUDIT, parse_json(content or b"")[0])
        except Unreadable as error:
            problems.append(f"{FOLDER}/{name} {error}")
            continue
        if faults:
            problems.append(f"{FOLDER}/{name}: {faults[0]}; it is left out.")
        elif value is not None:
            results.append(value)
    if len(names) > MOST:
        problems.append(f"{FOLDER}: only {MOST} of {len(names):,} audits are read.")
    return sorted(results, key=lambda audit: audit["step"]), problems


# --- tables


def audit_tables(audit: Audit) -> list[Table]:
    """Return the tables of an audit: the error by position, and that of advantages by λ."""
    positions = [
        (
            place(row["first"], row["last"]),
            [
                f"{row['states']:,}",
                short(row["value"]),
                short(row["mean_return"]),
                interval(row["bias"]),
                interval(row["rmse"]),
                short(row["deviation"]),
            ],
        )
        for row in audit["positions"]
    ]
    names = ["states", "V", "mean return", "bias of V", "RMS error of V", "sd of one return"]
    by_lam = [
        (
            f"λ = {row['lam']:g}{' (the run’s)' if row['lam'] == audit['lam'] else ''}",
            [
                interval(row["error"]) + (" ·" if row["is_best"] else ""),
                short(row["bias"]["value"]),
                short(row["bias_of_returns"]["value"]),
                short(row["deviation"]),
                "–" if row["correlation"] is None else short(row["correlation"]),
            ],
        )
        for row in audit["advantages"]["by_lam"]
    ]
    return [
        ("V against the mean return of continuations [95 % interval]", names, positions),
        (
            "advantage estimates against Monte Carlo (· = not significantly worse than the best)",
            ["error", "bias", "without V(s)", "sd", "correlation"],
            by_lam,
        ),
    ]


def place(first: int, last: int) -> str:
    """Return a range of positions in words. Tokens are counted from 1."""
    if first == last:
        return "first token" if first == 0 else f"token {first + 1:,}"
    return f"tokens {first + 1:,} to {last + 1:,}"


def short(value: float | None) -> str:
    """Return a number with three digits, such as −0.0123."""
    return number(0.0 if value is not None and abs(value) < NOTHING else value)


def interval(numbers: Mapping[str, Any] | None) -> str:
    """Return an estimate with its interval, such as 0.61 [0.58, 0.64]."""
    if numbers is None:
        return "–"
    if numbers["low"] is None or numbers["high"] is None:
        return short(numbers["value"])
    return f"{short(numbers['value'])} [{short(numbers['low'])}, {short(numbers['high'])}]"


# --- sentences


def audit_sentences(audit: Audit) -> list[str]:
    """Return what an audit means, the most important first."""
    sentences = [
        _level(audit),
        _first_token(audit),
        _worst_range(audit),
        _kind_of_error(audit),
        _explained(audit),
        _ranking(audit),
        _where_right(audit),
        *_advantages(audit),
    ]
    if audit["unscored"]:
        sentences.append(
            f"The reward gave no score to {audit['unscored']:,} of {audit['responses']:,} "
            "responses; they are left out."
        )
    return [sentence for sentence in sentences if sentence]


def is_significant(numbers: Mapping[str, Any], about: float = 0.0) -> bool:
    """Return whether a number is outside of the interval of an estimate."""
    low, high = numbers["low"], numbers["high"]
    return low is not None and high is not None and not low <= about <= high


def _side(value: float) -> str:
    return f"{abs(value):.2g} too {'high' if value > 0 else 'low'}"


def _level(audit: Audit) -> str:
    level = audit["level"]
    if not is_significant(level):
        return (
            f"On average V is right within the noise: V less the mean return is {interval(level)} "
            f"over {audit['states']:,} states of answers to {audit['prompts']:,} prompts."
        )
    return (
        f"On average the critic is {_side(level['value'])}: V less the mean return is "
        f"{interval(level)} over {audit['states']:,} states."
    )


def _first_token(audit: Audit) -> str:
    row = audit["positions"][0] if audit["positions"] else None
    if row is None or row["first"] > 0:
        return ""
    if not is_significant(row["bias"]):
        off = (
            f"is off by {short(row['rmse']['value'])} (RMS)"
            if row["rmse"]["value"]
            else "has no error beyond the noise"
        )
        return (
            f"At the first token its mean is right within the noise, {interval(row['bias'])}; for "
            f"a single prompt it {off}."
        )
    return f"At the first token the critic is {_side(row['bias']['value'])} on average."


def _worst_range(audit: Audit) -> str:
    """Return a sentence on the range of later positions whose bias is largest, where one is
    significant and not just the level of all."""
    rows = [
        row
        for row in audit["positions"]
        if row["first"] > 0 and is_significant(row["bias"], audit["level"]["value"])
    ]
    rows = [row for row in rows if is_significant(row["bias"])]
    if not rows:
        return ""
    worst = max(rows, key=lambda row: abs(row["bias"]["value"]))
    where = place(worst["first"], worst["last"])
    at = "At" if worst["first"] == worst["last"] else "In"
    return f"{at} {where} the critic is {_side(worst['bias']['value'])}, {interval(worst['bias'])}."


def _kind_of_error(audit: Audit) -> str:
    """Return a sentence that names the largest part of the critic's error."""
    parts, rmse = audit["parts"], audit["rmse"]
    if not is_significant(rmse) or parts["total"] <= 0:
        return (
            "No error of V is left beyond the noise of the Monte Carlo returns "
            f"(RMS {interval(rmse)})."
        )
    size = f"RMS {interval(rmse)}"
    name = max(("level", "position", "rest"), key=lambda part: float(parts[part]))
    share = f"{100 * parts[name] / parts['total']:.0f}% of its square"
    if name == "level":
        return f"Its error ({size}) is mostly a constant offset: {share}."
    if name == "position":
        return f"Its error ({size}) depends on the position in the answer: {share}."
    follows, slope = audit["follows"], audit["calibration"]["slope"]
    if follows is not None and (follows["high"] or 0.0) < 0.5:
        return (
            f"Its error ({size}) is that it does not follow the answer: where the expected return "
            f"moves by 1 along an answer, V moves by {interval(follows)}."
        )
    if slope is not None and slope["high"] is not None and slope["high"] < 1:
        return (
            f"Its error ({size}) is mostly noise, different from state to state: V is spread too "
            f"widely, and where it is 1 higher, the mean return is {interval(slope)} higher."
        )
    if slope is not None and slope["low"] is not None and slope["low"] > 1:
        return (
            f"Its error ({size}) is that V is spread too narrowly: where it is 1 higher, the mean "
            f"return is {interval(slope)} higher."
        )
    return (
        f"Its error ({size}) differs from state to state, with neither offset nor trend: {share}."
    )


def _explained(audit: Audit) -> str:
    variance = audit["variance"]
    if variance["explained"] is None or variance["possible"] is None:
        return ""
    of_expected = variance["explained_of_expected"]
    more = (
        ""
        if of_expected is None
        else f" Of the variance of expected returns it explains {_percent(of_expected)}."
    )
    return (
        f"V explains {_percent(variance['explained'])} of the variance of single returns; a "
        f"perfect critic would explain {_percent(variance['possible'])}.{more}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%".replace("-", "−")


def _ranking(audit: Audit) -> str:
    clear = audit["ranking"]["clear"]
    if clear is None:
        return (
            f"No two of the next tokens at one state have mean returns that differ clearly "
            f"({audit['ranking']['pairs']:,} pairs), so its ranking of tokens cannot be judged. "
            "Raise --continuations."
        )
    ends = f"{_percent(clear['low'])} to {_percent(clear['high'])}"
    verdict = (
        "better than guessing"
        if clear["low"] > 0.5
        else "worse than guessing"
        if clear["high"] < 0.5
        else "not distinguishable from guessing"
    )
    return (
        f"Of two next tokens with clearly different mean returns it prefers the better one in "
        f"{_percent(clear['value'])} of {clear['n']:,} pairs ({ends}): {verdict}."
    )


def _where_right(audit: Audit) -> str:
    right = audit["where_right"]
    if right["deviation"] is None:
        return "In no state V is within the interval of the mean return."
    return (
        f"Where V is right ({right['states']:,} of {audit['states']:,} states), a single return "
        f"still differs from it by {short(right['deviation'])} (standard deviation)."
    )


def _advantages(audit: Audit) -> list[str]:
    rows, true = audit["advantages"]["by_lam"], audit["advantages"]["true_deviation"]
    if not rows:
        return []
    best = min(rows, key=lambda row: float(row["error"]["value"]))
    own = next((row for row in rows if row["lam"] == audit["lam"]), None)
    sentence = (
        f"A single advantage estimate is closest to Monte Carlo at λ = {best['lam']:g}: its error "
        f"is {short(best['error']['value'])} (bias {short(best['bias']['value'])}, standard "
        f"deviation {short(best['deviation'])}), "
        + (
            f"and true advantages have a standard deviation of {short(true)}."
            if true
            else "and the true advantages do not differ beyond the noise: sample more."
        )
    )
    sentences = [sentence]
    if own is not None and own is not best:
        verdict = "not significantly more" if own["is_best"] else "significantly more"
        sentences.append(
            f"At the run’s λ = {own['lam']:g} the error is {short(own['error']['value'])}, "
            f"{verdict}."
        )
    known = [row for row in rows if row["correlation"] is not None]
    if known:
        top = max(known, key=lambda row: float(row["correlation"]))
        sentences.append(
            f"Estimates follow true advantages best at λ = {top['lam']:g}, with a correlation of "
            f"{short(top['correlation'])}; whitening makes their scale irrelevant."
        )
    return sentences


def audit_history(audits: Sequence[Audit]) -> Table | None:
    """Return a table with a row per audited step; None for fewer than two."""
    if len(audits) < 2:
        return None
    columns = ["level", "RMS error", "slope", "explained", "possible", "pairs right", "best λ"]
    rows = []
    for audit in audits:
        by_lam, clear = audit["advantages"]["by_lam"], audit["ranking"]["clear"]
        best = min(by_lam, key=lambda row: float(row["error"]["value"]), default=None)
        variance = audit["variance"]
        shares = [variance["explained"], variance["possible"]]
        rows.append(
            (
                f"step {audit['step']:,}",
                [
                    interval(audit["level"]),
                    interval(audit["rmse"]),
                    interval(audit["calibration"]["slope"]),
                    *("–" if share is None else _percent(share) for share in shares),
                    "–" if clear is None else _percent(clear["value"]),
                    "–" if best is None else f"{best['lam']:g}",
                ],
            )
        )
    return "the audited steps", columns, rows
