"""Sequences of what a user does with one pipeline: other schedulers, processors, dtypes, further pipelines, calls, faults."""

import diffusers
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from goca_guidance import GoCASCFGPipeline
from tests.fuzz.cases import CALLBACKS
from tests.fuzz.faults import FAULTS, injected
from tests.fuzz.pairs import Pair, pair_of
from tests.fuzz.state import changed, state_of
from tests.fuzz.trial import is_own
from tests.fuzz.values import noise
from tests.helpers.families import add_lora, stock_pipeline
from tests.helpers.guided import NEUTRAL


SCHEDULERS = ["DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
              "UniPCMultistepScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler"]  # fmt: skip
FAMILIES = st.sampled_from(["sd", "sdxl"])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


class Life(RuleBasedStateMachine):
    """One pair of pipelines on the same modules; each call leaves all as it was, and at a rate of one is stock's."""

    pair: Pair

    @initialize(name=FAMILIES)
    def begins(self, name):
        self.pair = pair_of(name, stock_pipeline(name))

    # ---- what a user changes -----------------------------------------------------------------------------------------
    @rule(name=st.sampled_from(SCHEDULERS))
    def another_scheduler(self, name):
        scheduler = getattr(diffusers, name).from_config(self.pair.stock.scheduler.config)
        self.pair.stock.scheduler = self.pair.ours.scheduler = scheduler

    @rule(dtype=DTYPES)
    def another_dtype(self, dtype):
        self.pair.stock.to(dtype)

    @rule(kind=st.sampled_from([AttnProcessor, AttnProcessor2_0]))
    def other_processors(self, kind):
        self.pair.stock.unet.set_attn_processor(kind())

    @rule(on=st.booleans())
    def slicing(self, on):
        if on:
            self.pair.stock.enable_attention_slicing(1)
        else:
            self.pair.stock.disable_attention_slicing()

    @rule()
    def a_further_pipeline(self):
        self.pair = Pair(self.pair.name, self.pair.stock, GoCASCFGPipeline.from_pipe(self.pair.ours), self.pair.call)
        self.pair.ours.set_progress_bar_config(disable=True)

    @rule()
    def an_adapter(self):
        if not getattr(self.pair.stock.unet, "peft_config", None):
            add_lora(self.pair.stock)

    @rule(kind=st.sampled_from(["channels_last", "freeu", "tiling"]))
    def a_switch(self, kind):
        if kind == "channels_last":
            self.pair.stock.unet.to(memory_format=torch.channels_last)
        elif kind == "freeu":
            self.pair.stock.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        else:
            self.pair.stock.vae.enable_tiling()

    # ---- what a user calls ---------------------------------------------------------------------------------------------
    @rule(callback=st.none() | st.sampled_from(CALLBACKS), fault=st.none() | FAULTS, steps=st.integers(1, 2))
    def generates(self, callback, fault, steps):
        given = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(0)}
        given |= {"callback_on_step_end": callback.make(self.pair)} if callback else {}
        self.harmless(fault, lambda: self.pair.ours("a cat on grass", **self.pair.call | given))

    @rule(fault=st.none() | FAULTS)
    def segments(self, fault):
        self.harmless(fault, lambda: self.pair.ours.segment(noise(), ["cat", "bus"], height=16, width=16))

    @rule(fault=st.none() | FAULTS)
    def discovers(self, fault):
        self.harmless(fault, lambda: self.pair.ours.discover(noise(), height=16, width=16, size=8))

    @rule(arguments=st.sampled_from([{"use_scfg": False}, {"scfg": NEUTRAL}]))
    def generates_as_stock_does(self, arguments):
        expected = self.stock_output()
        found = output_of(
            lambda: self.pair.ours("a cat", **self.pair.call, generator=torch.Generator().manual_seed(0), **arguments)
        )
        assert same(found, expected) or is_own(found), repr(found)

    def harmless(self, fault, call) -> None:
        """Whatever the call did, all is as before it."""
        stock, before = self.stock_output(), state_of(self.pair)
        with injected(self.pair, fault):
            found = output_of(call)
        assert not isinstance(found, BaseException) or is_own(found) or same(found, stock), repr(found)
        assert changed(before, state_of(self.pair)) == []
        assert same(self.stock_output(), stock)

    def stock_output(self):
        """Or the error, where stock does not take what the user changed."""
        return output_of(self.pair.plain)


def output_of(call):
    """A call's images, or what else it returns, or the error that it raised."""
    try:
        output = call()
    except BaseException as error:
        return error
    return getattr(output, "images", output)


def same(a, b) -> bool:
    """The same tensor, or errors of one type."""
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else type(a) is type(b)
