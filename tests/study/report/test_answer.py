"""The sentences of a report follow from its figures."""

from mla_lm.study.report.answer import answer, caveats, further_answers
from mla_lm.study.result import Estimate, Result
from tests.study.report.results import a_result


def with_difference(mean: float, low: float | None, high: float | None, seeds: int = 5) -> Result:
    """MLA's difference to MHA, whose test loss is 4, in nats."""
    result = a_result(("mla", "mha"), seeds)
    result.rows[0].difference = Estimate([mean] * seeds, mean, low, high)
    result.rows[1].estimates["test_loss"] = Estimate([4.0] * seeds, 4.0)
    return result


def test_below():
    assert answer(with_difference(-0.032, -0.06, -0.004)) == (
        "MLA's test loss is 0.8% below MHA's (95% interval −1.5% to −0.1%) at 0.208 of its cache, over 5 seeds."  # noqa: RUF001
    )


def test_above():
    assert answer(with_difference(0.032, 0.004, 0.06)) == (
        "MLA's test loss is 0.8% above MHA's (95% interval +0.1% to +1.5%) at 0.208 of its cache, over 5 seeds."
    )


def test_an_interval_with_zero_in_it_decides_nothing():
    said = answer(with_difference(-0.004, -0.04, 0.032))
    assert said == (
        "MLA's test loss cannot be told apart from MHA's at 0.208 of its cache: the difference is −0.1% "  # noqa: RUF001
        "(95% interval −1.0% to +0.8%), over 5 seeds."  # noqa: RUF001
    )
    assert "below" not in said
    for low, high in ((0.0, 0.1), (-0.1, 0.0)):
        assert "cannot be told apart" in answer(with_difference(0.0, low, high))


def test_one_seed_may_be_chance():
    result = with_difference(-0.032, None, None, seeds=1)
    assert answer(result) == (
        "MLA's test loss is 0.8% below MHA's at 0.208 of its cache, with one seed: without a second seed there is no "
        "interval, so this may be chance."
    )
    assert any("fewer than 5 seeds" in line for line in caveats(result))


def test_a_missing_interval_is_said():
    assert "over 5 seeds: its interval could not be measured" in answer(with_difference(-0.032, None, None))


def test_a_variant_of_the_baseline_has_its_cache():
    result = with_difference(0.032, 0.004, 0.06)
    for row in result.rows:
        row.figures["cache_bytes_per_token"] = 3072
    assert "above MHA's (95% interval +0.1% to +1.5%) with the same cache, over 5 seeds" in answer(result)


def test_small_differences_keep_a_digit():
    assert "0.02% below" in answer(with_difference(-0.0008, -0.0012, -0.0004))


def test_the_largest_mla_is_spoken_of_and_the_others_follow():
    result = a_result(("gqa", "mha", "mla"), sizes=("tiny", "small"))
    for row in result.rows:
        row.figures["parameters"] = {"tiny": 1, "small": 2}[row.size]
    assert answer(result).startswith("mla_small's test loss")
    assert [sentence.split("'")[0] for sentence in further_answers(result)] == ["mla_tiny", "gqa_small", "gqa_tiny"]


def test_without_a_baseline_the_lowest_is_named_and_nothing_claimed():
    result = a_result(("mla", "gqa", "mqa"))
    losses = {row.kind: row.estimates["test_loss"].mean for row in result.rows}
    best = min(losses, key=losses.__getitem__)
    assert answer(result).startswith(
        f"{best.upper()} has the lowest test loss (nats per token) of 3 rows, {losses[best]:.3f}"
    )
    assert "open" in answer(result)


def test_one_row_and_none():
    assert answer(a_result(("mla",), seeds=1)).endswith(", over one seed.")
    result = a_result(())
    assert answer(result) == "No run has finished, so there is nothing to compare."
    assert (further_answers(result), caveats(result)) == ([], [])


def test_caveats():
    result = a_result(("mla", "mha"))
    assert caveats(result) == []
    result.rows[0].notes = ["2 of 5 seeds are unfinished"]
    result.rows[0].figures["tokens_seen"] /= 2
    result.corpus["other"] = "prose"
    notes, lengths, corpora = caveats(result)
    assert notes == "mla_small: 2 of 5 seeds are unfinished."
    assert "different numbers of tokens" in lengths
    assert "bits per byte" in corpora
