"""Without a network, a name of the hub is refused in a few seconds."""

import time

import datasets.config
import pytest
from huggingface_hub import constants

from ressa.data import hub_access
from ressa.data.hub_access import cache_alone_if_unreachable, hub_answers
from ressa.data.load_data import load_data
from ressa.models.load_model import load_model


@pytest.fixture
def online(monkeypatch):
    "The libraries believe that they are online, and the hub does not exist."
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("load", [load_model, load_data])
def test_no_network_is_said_at_once(online, load):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="no/such-name.*the hub cannot be reached"):
        load("no/such-name")
    assert time.perf_counter() - start < 3
    assert not constants.HF_HUB_OFFLINE


def test_a_hub_that_never_answers_is_not_waited_for(online, monkeypatch):
    monkeypatch.setattr(hub_access, "_connect", lambda endpoint: time.sleep(20))
    start = time.perf_counter()
    with cache_alone_if_unreachable():
        assert constants.HF_HUB_OFFLINE
    assert time.perf_counter() - start < 3


def test_a_hub_that_answers_is_used(online, monkeypatch):
    monkeypatch.setattr(hub_access, "_connect", lambda endpoint: None)
    assert hub_answers()
    with cache_alone_if_unreachable():
        assert not constants.HF_HUB_OFFLINE


def test_who_is_offline_by_choice_is_not_asked(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_access, "_connect", lambda endpoint: None)
    assert not hub_answers()


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "a/b/c", "~/none"])
def test_a_path_is_never_looked_up_on_the_hub(online, monkeypatch, name):
    monkeypatch.setattr(hub_access, "hub_answers", None)  # calling it would fail
    for load in (load_model, load_data):
        with pytest.raises(ValueError, match="check the path"):
            load(name)
