"""Secrets: what counts as one, and that none is written down."""

from __future__ import annotations

import io
import logging
import logging.config
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adaptax.config import UserError, key_paths
from adaptax.redact import MASK, SecretFilter, check_no_secrets, find_secret, is_secret_name, redact

HUB = "hf_" + "S3CRETs3cretS3CRETs3cret"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEs3cretS3CRET\n-----END RSA PRIVATE KEY-----"
SECRETS = {  # what holds it: (kind, text); the secret part is made of s3cret
    "hub": ("a Hugging Face token", HUB),
    "hub in a name": ("a Hugging Face token", f"token_{HUB}"),
    "hub of an organisation": ("a Hugging Face token", "api_org_" + "S3CRET" * 5),
    "hub by OAuth": ("a Hugging Face token", f"hf_oauth_eyJ{'s3cret' * 5}.eyJ{'S3CRET' * 3}.s3cret-S3CRET"),
    "openai": ("an API key (sk-...)", "sk-" + "s3cretS3CRET" * 4),
    "anthropic": ("an API key (sk-...)", "sk-ant-api03-s3-cret_S3CRET-s3cret"),
    "github": ("a GitHub token", "ghp_" + "s3cretS3CRET" * 3),
    "github, fine": ("a GitHub token", "github_pat_" + "s3cretS3CRET_" * 3),
    "gitlab": ("a GitLab token", "glpat-s3cretS3CRETs3cret"),
    "aws": ("an AWS access key", "AKIA" + "S3CRETS3CRETS3CR"),
    "google": ("a Google API key", "AIza" + "s3cretS3CRET" * 2 + "s3cretS3CRE"),
    "slack": ("a Slack token", "xoxb-123456-s3cretS3CRET"),
    "jwt": ("a web token (JWT)", "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.s3cretS3CRET"),
    "bearer": ("a bearer token", "Authorization: Bearer s3cretS3CRETs3cret"),
    "url": ("a password in a URL", "postgres://me:s3cret@db.example/x"),
    "url without a name": ("a password in a URL", "redis://:S3CRET@db.example"),
    "url with signs": ("a password in a URL", "https://me:s3@cret,S3:CRET@hub.example/x"),
    "pem": ("a private key", PEM),
    "pem cut off": ("a private key", PEM[:50]),
    "pgp": ("a private key", "-----BEGIN PGP PRIVATE KEY BLOCK-----\n\ns3cret\n-----END PGP PRIVATE KEY BLOCK-----"),
}
HARMLESS = [
    "",
    "outputs/hf_gemma_3_270m_it_instruction_tuned",
    "hf_transfer",
    "google/gemma-3-270m-it",
    "hf://datasets/me/rows@main/train.parquet",
    "hub:org/name/config@train[:10%]",
    "https://huggingface.co/google/gemma-3-1b-it",
    "http://localhost:8080/v1?mail=me@example.com",
    '{"url": "http://localhost:8080", "mail": "me@example.com"}',
    "https://me@github.com/x",
    "https://me:${oc.env:PASSWORD}@db.example",
    "https://me:{password}@db.example and https://me:%s@db.example",
    f"https://me:{MASK}@db.example",
    "task-force-of-the-far-away-mountains, risk-assessment-of-far-away-places",
    "sk-learn-pipeline-results-2024",
    "the bearer responsibilities",
    "0123456789abcdef0123456789abcdef01234567",  # a commit
    "AKIABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "-----BEGIN CERTIFICATE-----",
    ".*q_einsum|.*kv_einsum",
]


@pytest.fixture(autouse=True)
def _no_secrets_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine itself has in its environment is not looked at."""
    monkeypatch.setattr("os.environ", {"HOME": "/home/me", "PATH": "/usr/bin:/bin"})


@pytest.mark.parametrize("held", SECRETS)
def test_well_known_kinds_are_found_and_hidden(held: str) -> None:
    kind, text = SECRETS[held]
    for around in ("{}", "see {} here", "'{}'", "a={}\nb"):
        if held == "pem cut off" and around != "{}":
            continue
        shown = redact(around.format(text))
        assert find_secret(around.format(text)) == kind
        assert "cret" not in shown.lower()
        assert MASK in shown
        assert find_secret(shown) is None
        assert redact(shown) == shown


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_alike_stays(text: str) -> None:
    assert find_secret(text) is None
    assert redact(text) == text


def test_what_is_around_a_secret_stays() -> None:
    assert redact(f"fetching with {HUB}: 403") == f"fetching with {MASK}: 403"
    assert redact("https://me:s3cret@hub.example/x?y") == f"https://me:{MASK}@hub.example/x?y"
    assert redact("Authorization: Bearer s3cretS3CRETs3cret, x") == f"Authorization: Bearer {MASK}, x"
    assert redact(f"a\n{PEM}\nb\n{PEM}\nc") == f"a\n{MASK}\nb\n{MASK}\nc"


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_APIKEY", "AWS_SECRET_ACCESS_KEY"),
        *("AWS_SESSION_TOKEN", "DB_PASSWORD", "PGPASSWORD", "MY_PASSWD", "SSH_PRIVATE_KEY", "GCP_CREDENTIALS"),
        *("CREDENTIAL", "TOKEN1", "MY_SECRETS", "hf_token", "+hf_token", "model.api_key", "apiKey", "model.authToken"),
        *("hydra.job.env_set.WANDB_API_KEY", "--token", "wandb-api-key"),
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("TOKENIZERS_PARALLELISM", "TOKENIZER_TOKENS", "MAX_TOKENS", "HF_TOKEN_PATH", "PASSWORD_FILE", "SECRET_DIR"),
        *("SECRET_NAME", "TOKEN_URL", "SECRETARY", "PWD", "KEYBOARD", "BROKEN", "model.tokenizer", "data.eos_token"),
        *key_paths(),
    ],
)
def test_names_of_other_things(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "DB_PASSWORD"])
def test_a_variable_whose_name_says_so_holds_a_secret(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, " correct horse\n")  # as read from a file
    assert find_secret("see correct horse here") == f"the value of {name}"
    assert redact("see correct horse here") == f"see {MASK} here"
    assert find_secret("see correct") is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "false-or-true"),
        ("HF_TOKEN_PATH", "correct-horse"),
        ("DB_PASSWORD", "short"),
        ("DB_PASSWORD", "   \n     "),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/keys/gcp.json"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "~/keys/my project/gcp"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "keys/gcp.json"),
        ("HOSTNAME", "correct-horse"),
    ],
)
def test_other_variables_do_not(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert find_secret(f"see {value} here") is None
    assert redact(f"see {value} here") == f"see {value} here"


def test_a_key_with_slashes_is_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("wJalrXUtnFEMI/K7MDENG/bPxRfiCYs3cretKEY", "/JalrXUtnFEMIxK7MDENGxbPxRfiCYs3cretKEYK"):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", value)
        assert redact(f"with {value}") == f"with {MASK}"


def test_a_secret_in_another_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "s3cret-one")
    monkeypatch.setenv("B_TOKEN", "s3cret-one-and-more")
    assert redact("s3cret-one-and-more, s3cret-one") == f"{MASK}, {MASK}"


def test_long_texts_take_no_long_time() -> None:
    """Texts that a pattern begins to match again and again."""
    starts = [
        "a",
        " ",
        "hf_",
        "hf_a.",
        "sk-",
        "sk-or-",
        "://",
        "://a:",
        "b@",
        "eyJ",
        "eyJaaaaaaaaaaa.",
        "bearer ",
        "xoxb-",
    ]
    for start in [*starts, "-----BEGIN ", "-----BEGIN PRIVATE KEY"]:
        started = time.process_time()
        redact(start * (200_000 // len(start)))
        assert time.process_time() - started < 1, start


VALUES = {"name": "trial", "model": {"weights": None, "lora_rank": 8}, "data": {"train": ["a.jsonl", {"path": "b"}]}}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"model": {"weights": HUB}}, "model.weights holds a Hugging Face token"),
        ({"model": {"weights": f"https://me:{HUB}@hub.example/x"}}, "model.weights holds a password in a URL"),
        ({"data": {"train": ["a.jsonl", {"path": HUB}]}}, "data.train[1].path holds a Hugging Face token"),
        ({"data": {"filter": {HUB: 1}}}, "a key in data.filter holds a Hugging Face token"),
        ({HUB: 1}, "a key in the configuration holds a Hugging Face token"),
        ({"name": "trial of correct-horse"}, "name holds the value of WANDB_API_KEY"),
        ({"data": {1: ("correct-horse",)}}, "data.1[0] holds the value of WANDB_API_KEY"),
    ],
)
def test_a_secret_in_a_configuration_is_refused(
    change: dict[Any, Any], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "correct-horse")
    with pytest.raises(UserError) as caught:
        check_no_secrets(VALUES | change)
    message = str(caught.value)
    assert message.startswith(f"{where}, and runs write their configuration down: take it out; ")
    assert "belong in the environment, such as HF_TOKEN" in message
    assert "cret" not in message.replace("secret", "")
    assert "horse" not in message
    assert "\n" not in message


def test_a_configuration_without_secrets_passes() -> None:
    check_no_secrets(VALUES)
    check_no_secrets({"data": {"filter": {"token": "x", "password": True}, "columns": {"prompt": "api_key"}}})
    check_no_secrets({})


def test_where_a_text_alone_stands_is_said() -> None:
    with pytest.raises(UserError, match=r"^the page holds a Hugging Face token"):
        check_no_secrets(HUB, "the page")


@pytest.fixture
def log() -> Iterator[Callable[..., str]]:
    """``log(call)``: what handlers print while ``call(logger)`` runs; a plain handler comes after the filtered one."""
    first, second = io.StringIO(), io.StringIO()
    logger = logging.getLogger("adaptax.tests.redact")
    logger.propagate = False
    handlers = [logging.StreamHandler(stream) for stream in (first, second)]
    handlers[0].addFilter(SecretFilter())
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s", defaults={"user": "-"}))
        logger.addHandler(handler)

    def capture(call: Callable[[logging.Logger], object]) -> str:
        call(logger)
        assert first.getvalue() == second.getvalue()
        return first.getvalue()

    yield capture
    for handler in handlers:
        logger.removeHandler(handler)


class Holder:
    """An object that shows a secret."""

    def __str__(self) -> str:
        return f"<{HUB}>"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ((f"with {HUB}",), f"with {MASK}"),
        (("with %s", HUB), f"with {MASK}"),
        (("%d of %.1f, %r: %s", 1, 2.0, HUB, "x"), f"1 of 2.0, '{MASK}': x"),
        (("%(who)s of %(n)d", {"who": HUB, "n": 3}), f"{MASK} of 3"),
        (("with hf_%s", HUB[3:]), f"with {MASK}"),  # neither part is one
        (("%s", Holder()), f"<{MASK}>"),
        (("%s", [HUB, {"a": HUB}]), f"['{MASK}', {{'a': '{MASK}'}}]"),
        (("%s", ValueError(HUB)), MASK),
        ((Holder(),), f"<{MASK}>"),
        (("100 %% sure of %s", HUB), f"100 % sure of {MASK}"),
        (("no secret %s %d %%", "here", 3), "no secret here 3 %"),
        (("plain 100 %",), "plain 100 %"),
    ],
)
def test_the_log_hides_secrets(log: Callable[..., str], arguments: tuple[Any, ...], shown: str) -> None:
    assert log(lambda logger: logger.warning(*arguments)) == f"WARNING {shown}\n"


def test_arguments_that_are_not_shown_are_cleared_too() -> None:
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "%.3s", (HUB,), None)
    assert SecretFilter().filter(record)
    assert (record.getMessage(), record.args) == ("hf_", ())


def test_a_record_without_secrets_is_left_as_it_is() -> None:
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "%s of %s", ("a", Holder), None)
    before = dict(vars(record))
    assert SecretFilter().filter(record)
    assert vars(record) == before


def test_a_call_whose_arguments_do_not_fit_shows_none(log: Callable[..., str]) -> None:
    shown = log(lambda logger: logger.warning("%d steps", HUB))
    assert shown == "WARNING %d steps (TypeError: its arguments do not fit)\n"


def test_tracebacks_hide_secrets_and_stay(log: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "correct-horse")

    def fail(logger: logging.Logger) -> None:
        try:
            try:
                raise ValueError(f"bad token {HUB}")
            except ValueError as error:
                raise RuntimeError("for correct-horse") from error
        except RuntimeError:
            logger.exception("it failed with %s", HUB, stack_info=True)

    shown = log(fail)
    assert shown.startswith(f"ERROR it failed with {MASK}\nTraceback (most recent call last):\n")
    assert f"ValueError: bad token {MASK}\n" in shown
    assert f"RuntimeError: for {MASK}\n" in shown
    assert "Stack (most recent call last):\n" in shown
    assert HUB not in shown


def test_a_traceback_without_secrets_stays_a_traceback(log: Callable[..., str]) -> None:
    """Handlers that draw them in their own way still can."""
    try:
        raise ValueError("plain")
    except ValueError as error:
        record = logging.LogRecord("x", logging.INFO, "x.py", 1, HUB, (), (ValueError, error, error.__traceback__))
    assert SecretFilter().filter(record)
    assert record.exc_info is not None
    assert record.exc_info[1] is not None
    assert record.exc_text is None
    assert log(lambda logger: logger.handle(record)).endswith("ValueError: plain\n")


def test_what_extra_brings_is_hidden() -> None:
    record = logging.makeLogRecord({"msg": "x", "user": HUB, "count": 3})
    assert SecretFilter().filter(record)
    assert (vars(record)["user"], vars(record)["count"]) == (MASK, 3)


def test_variables_set_before_and_after_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(text: str) -> str:
        record = logging.makeLogRecord({"msg": text})
        secrets.filter(record)
        return record.getMessage()

    monkeypatch.setenv("HF_TOKEN", "correct-horse")
    secrets = SecretFilter()
    monkeypatch.delenv("HF_TOKEN")  # as programs do that hand nothing on
    monkeypatch.setenv("WANDB_API_KEY", "battery-staple")
    assert shown("correct-horse, battery-staple") == f"{MASK}, {MASK}"
    assert shown("HF_TOKEN is set") == "HF_TOKEN is set"


def test_a_configuration_of_logging_can_name_the_filter(tmp_path: Path) -> None:
    handler = {"class": "logging.FileHandler", "filename": str(tmp_path / "run.log"), "filters": ["secrets"]}
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "filters": {"secrets": {"()": "adaptax.redact.SecretFilter"}},
            "handlers": {"file": handler},
            "loggers": {"adaptax.tests.dict": {"handlers": ["file"], "propagate": False}},
        }
    )
    logger = logging.getLogger("adaptax.tests.dict")
    logging.getLogger("adaptax.tests.dict.child").warning("with %s", HUB)
    for open_handler in list(logger.handlers):
        open_handler.close()
        logger.removeHandler(open_handler)
    assert (tmp_path / "run.log").read_text() == f"with {MASK}\n"
