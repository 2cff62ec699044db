"""The program that measures what the options cost in accuracy."""

from eval import savings as program
from eval.common.load import load_pipeline
from goca_guidance import TINY_SD


def test_the_default_has_no_error(monkeypatch):
    """Forced onto its own latents, and left to itself; an option has one."""
    pipe, settings = load_pipeline(TINY_SD), program.SavingsSettings(captions=2, steps=3, batch=2)
    default = program.generate(pipe, 0, settings, output_regions=True)
    forced = program.generate(pipe, 0, settings, on=default, output_regions=True)
    assert program.regional(forced, default) == {"same region": 100, "same foreground": 100}
    assert program.difference(default, program.generate(pipe, 0, settings)) == {"latents": 0, "pixels": 0}
    monkeypatch.setattr(program, "OPTIONS", [program.Option(), program.Option(side=0.5)])
    (found,) = program.errors(pipe, settings)
    assert found.keys() == {"default", "CFG", "working_size=8"}
    assert found["working_size=8"]["same region"] < 100
    assert min(found["CFG"]["pixels"], found["working_size=8"]["pixels"]) > 0
