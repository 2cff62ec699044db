"""Captions from an OpenAI-compatible vision endpoint, kept in a file of the released format (see `eval.prompts.sources`)."""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import requests
from filelock import FileLock
from PIL import Image
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from eval.common.files import write_json
from eval.datasets.benchmarks import BadSample
from eval.prompts.phrases import BACKGROUND
from eval.prompts.sources import CaptionSource, read_captions
from goca_guidance.schema import Positive, at_least, checked


INSTRUCTION = """\
Write one line: the things that this picture shows, objects first and surroundings after, as nouns in the singular with \
commas between them, each kind of thing once, at most 20 words in all. No verbs, no sentences, no numbers. Put an object \
that wears or carries something, or whose parts stand out, in one parenthesis with these: (person, clothes, hat). \
Wherever one of these words fits, use it and no other: {classes}."""
REFUSED = (400, 413, 415, 422)  # HTTP statuses that are about the picture: the run goes on without it
BUSY = (408, 429, 500, 502, 503, 504)  # HTTP statuses that are worth another try


@checked
class Endpoint(CaptionSource):
    """Prompts of captions that a vision model writes when an image is first asked for.

    `url` is the endpoint's base ("https://api.openai.com/v1"). The key is read from the environment variable
    `key_variable` at each request; it is kept nowhere and stands in no message. Every answer goes to the JSON file `cache`
    at once, so a run that was killed goes on where it was; use another file for another model. Processes may share it.
    Other arguments: `CaptionSource`. A busy server and a lost connection are tried again `retries` times, after `backoff`
    seconds, then twice as many, or as the server says; `timeout` seconds without an answer are a lost connection.
    """

    def __init__(
        self,
        classes: Sequence[str],
        url: str,
        model: str,
        cache: str | Path,
        aliases: Mapping[str, str] | None = None,
        key_variable: str = "OPENAI_API_KEY",
        retries: Annotated[int, at_least(0)] = 5,
        backoff: Annotated[float, at_least(0)] = 1.0,
        timeout: Positive = 120.0,
        **settings,
    ):
        super().__init__(classes, aliases, **settings)
        self.url, self.model, self.key_variable = f"{url.rstrip('/')}/chat/completions", model, key_variable
        self.cache, self.timeout = Path(cache), timeout
        again = Retry(
            retries, status_forcelist=BUSY, allowed_methods=None, backoff_factor=backoff, raise_on_status=False
        )
        self.session = requests.Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=again))
        self.captions = self._kept()

    def check(self, ids):
        """ValueError where an image has still to be captioned and there is no key."""
        if any(i not in self.captions for i in ids):
            self._key()

    def caption(self, sample_id, image):
        """The caption of an image, from the file where it is there."""
        if sample_id not in self.captions:
            text = self._ask(image)
            with FileLock(self.cache.with_name(f".{self.cache.name}.lock")):
                self.captions = {**self._kept(), sample_id: text}
                write_json(self.cache, {name: {"caption": caption} for name, caption in self.captions.items()})
        return self.captions[sample_id]

    def request(self, image: Image.Image) -> dict:
        """The body of a request."""
        file = io.BytesIO()
        image.convert("RGB").save(file, "JPEG", quality=95)
        picture = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        words = ", ".join(name for name in self.names if name != BACKGROUND)
        content = [
            {"type": "text", "text": INSTRUCTION.format(classes=words)},
            {"type": "image_url", "image_url": {"url": picture}},
        ]
        return {"model": self.model, "messages": [{"role": "user", "content": content}]}

    def _kept(self) -> dict[str, str]:
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        return read_captions(self.cache) if self.cache.exists() else {}

    def _ask(self, image):
        key = self._key()
        try:
            answer = self.session.post(self.url, json=self.request(image), auth=_Bearer(key), timeout=self.timeout)
        except requests.RequestException as error:
            raise self._failure(f"{type(error).__name__}: {error}", key) from None
        try:
            text = answer.json()["choices"][0]["message"]["content"] if answer.ok else None
        except (ValueError, KeyError, IndexError, TypeError):
            text = None
        if answer.status_code in REFUSED or (answer.ok and isinstance(text, str) and not text.strip()):
            reply = answer.text.replace(key, "***")[:500]
            raise BadSample(f"{self.model!r} gave no caption: status {answer.status_code}, {reply}")
        if not isinstance(text, str) or not text.strip():
            raise self._failure(f"status {answer.status_code}, {answer.text}", key)
        return text.strip()

    def _failure(self, what, key):
        return ValueError(
            f"Expected a caption by {self.model!r} from {self.url}, but got {what.replace(key, '***')[:500]!r}. Mend it "
            f"(address, model, the key in {self.key_variable}) and run again: the captions so far are in {self.cache}."
        )

    def _key(self):
        key = os.environ.get(self.key_variable, "").strip()
        if not (key and key.isascii() and key.isprintable()):
            raise ValueError(
                f"Expected the endpoint's key, in plain ASCII, in the environment variable {self.key_variable}, but it is "
                "not there: set it, to any word for a server that asks for none."
            )
        return key


class _Bearer(requests.auth.AuthBase):
    """The key as `Authorization: Bearer`; as `auth`, it is not overruled by a .netrc file."""

    def __init__(self, key: str):
        self.key = key

    def __call__(self, request):
        request.headers["Authorization"] = f"Bearer {self.key}"
        return request
