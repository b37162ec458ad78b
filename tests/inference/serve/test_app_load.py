"""Many clients at a time, right and wrong requests mixed: every answer is the one that is right alone."""

from __future__ import annotations

import pytest

from tests.lazy_module import need_packages

need_packages("fastapi", "uvicorn", "openai")

import threading  # noqa: E402
from dataclasses import replace  # noqa: E402

from pst_ds.cli.main import build_parser  # noqa: E402
from pst_ds.cli.serve import service as serving  # noqa: E402
from pst_ds.inference.serve.app import make_app  # noqa: E402
from tests.inference.serve.servers import start, stop  # noqa: E402
from tools.chaos.serving.__main__ import _growth  # noqa: E402
from tools.chaos.serving.clients import BODY_BYTES, KEY, MISTAKES, Load, _ask_wrongly, ask_alone, client  # noqa: E402
from tools.chaos.serving.model import answers, tiny_model  # noqa: E402

USERS = 4


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("load"), USERS)


@pytest.fixture(scope="module")
def load(served, request):
    """A load of a server in a thread. Right answers are those of transformers, which serves no users, or of the native
    decoder, one at a time."""
    is_native = request.param == "native"
    users = [None, *(f"user {i:02}" for i in range(USERS if is_native else 0))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(serving.KEYS, KEY)
        words = ["serve", *served.arguments(request.param), "--max-body", str(BODY_BYTES)]
        args = build_parser("serve").parse_args(words)
        service = serving.service_of(args, *serving.opened(args))
        quick = replace(service.limits, template_seconds=0.05)  # for the template that loops
        server, thread, url = start(make_app(replace(service, limits=quick)))
        found = ask_alone(f"{url}/v1", "tiny", users, (None, 1)) if is_native else answers(served)
        yield Load(found, name="tiny", url=f"{url}/v1")
        stop(server, thread)


@pytest.mark.thorough
@pytest.mark.parametrize("load", ["torch", "native"], indirect=True)
def test_texts_of_many_clients_are_those_written_alone(load):
    clients = [threading.Thread(target=client, args=(load, seed, lambda number: number < 6, 0.2)) for seed in range(8)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(120)
    assert load.asked == 48
    assert (load.wrong, load.misjudged, load.cut) == ([], [], 0)
    assert load.right > 24
    assert load.refused.total()
    assert load.left
    assert load.held
    assert len(set(load.answers.values())) > len(load.answers) / 2


@pytest.mark.parametrize("load", ["native"], indirect=True)
@pytest.mark.parametrize("kind", sorted(MISTAKES))
def test_a_wrong_request_has_its_own_status(load, kind):
    import httpx2 as httpx

    before = load.refused[kind]
    with httpx.Client(timeout=60.0) as plain:
        _ask_wrongly(load, plain, kind)
    assert load.misjudged == []
    assert load.refused[kind] == before + 1


def test_growth_is_from_when_it_was_warm_to_the_end():
    assert _growth([100] * 39) is None
    assert _growth([10] * 10 + [100] * 30) == 0.0
    assert _growth([100] * 40 + [110] * 10) == pytest.approx(0.1)
