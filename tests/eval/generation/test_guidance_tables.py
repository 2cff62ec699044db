"""The tables of the fair comparison, from rows by hand."""

from eval.generation.guidance_tables import guidance_table


def row(method, scale, value, start="noise", level="objects shown", model="tiny-sd", **others):
    return {"model": model, "start": start, "level": level, "method": method, "scale": scale, "value": value, **others}


def test_a_method_in_a_line_and_a_star_where_zero_is_outside():
    surely = {"difference": 0.1, "low": 0.05, "high": 0.15, "difference_equal_mean": 0.02, "low_equal_mean": -0.01,
              "high_equal_mean": 0.05}  # fmt: skip
    rows = [
        {"model": "tiny-sd", "start": "", "level": "objects shown", "method": "scenes", "value": 0.98},
        row("cfg", 3.0, 0.6),
        row("cfg", 4.0, 0.65),  # between, for equal means alone
        row("cfg", 5.0, 0.7),
        row("goca", 3.0, 0.7, **surely),
        row("goca", 5.0, 0.8, difference=0.1, low=0.0, high=0.2),
        row("goca", 3.0, 0.2, start="scene"),
        row("goca", 3.0, 0.3, level="distance"),
        row("goca", 3.0, 0.4, model="tiny-flux"),
    ]
    assert guidance_table(rows, ["noise", "objects_shown", "same_scale", "tiny-sd"]).splitlines() == [
        "| model | method | scale 3 | scale 5 |",
        "| --- | --- | --- | --- |",
        "| tiny-sd | scenes | 0.98 | 0.98 |",
        "| tiny-sd | cfg | 0.6 | 0.7 |",
        "| tiny-sd | goca | 0.7 (+0.1*) | 0.8 (+0.1) |",
    ]
    equal = guidance_table(rows, ["noise", "objects_shown", "equal_mean"]).splitlines()
    assert equal[-2:] == ["| tiny-sd | goca | 0.7 (+0.02) | 0.8 |", "| tiny-flux | goca | 0.4 |  |"]
