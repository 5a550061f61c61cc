"""`python -m worker rehearse` against real servers: an order is placed, cancelled and gone, or it is said why not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
import redis

from producer.keys import Keys
from producer.rights import acl_lines
from tests.loopback import Peer, Server, free_port, http_answer
from tests.rehearsing import (
    INFO,
    MARK,
    MODE,
    NAME,
    OPEN_ORDERS,
    ORDER,
    SYMBOL,
    TIME,
    GoOn,
    Hook,
    Relay,
    assert_no_secret,
    lost,
    pass_on,
    refusal,
    run,
    said,
)
from tests.servers import Peek, Valkey, python
from worker.rehearse import why_not_there
from worker.sandbox.control import RunningExchange
from worker.settings import Settings, SettingsError

# ---- it works --------------------------------------------------------------------------------------------------------


def test_an_order_is_placed_cancelled_and_gone(demo: dict[str, str], relay: Relay, connection: redis.Redis) -> None:
    """Each request and answer is shown, the cancel is a worker's DELETE, and neither order nor key is left."""
    done = python("-m", "worker", "rehearse", **demo)

    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert_no_secret(done.stdout)
    entry = relay.order()
    assert NAME.fullmatch(entry.client_algo_id)
    assert (entry.status, entry.deletes_effective) == ("CANCELED", 1)
    assert connection.dbsize() == 0
    lines = done.stdout.splitlines()
    assert lines[-1] == "passed: the order was placed, cancelled through the queue, and is gone"
    assert any(re.fullmatch(rf"#\d+ > DELETE {ORDER} algoId={entry.algo_id}", line) for line in lines)
    assert any(re.match(r'#\d+ < 200 .*"code": ?"200"', line) for line in lines)
    assert any("outcome: cancelled" in line for line in lines)
    placed = next(line for line in lines if "> POST" in line)
    assert "side=SELL type=STOP_MARKET quantity=0.002 triggerPrice=30000" in placed
    assert "workingType=MARK_PRICE reduceOnly=true" in placed
    assert "positionSide" not in placed
    assert "timestamp" not in done.stdout


def test_a_hedged_account_reduces_by_its_position_side(demo: dict[str, str], relay: Relay) -> None:
    """In hedge mode the order sells from the long side, without the flag that is refused there."""
    relay.exchange.set_hedge_mode()

    code, text = run(demo)

    assert code == 0, text
    (placed,) = relay.asked("POST")
    assert "positionSide=LONG" in placed
    assert "side=SELL" in placed
    assert "reduceOnly" not in placed


def test_any_symbol_is_found(demo: dict[str, str], relay: Relay) -> None:
    """The symbol's rules are found however long the exchange's list is, and whatever letters its name has."""

    def longer(go_on: GoOn) -> bytes:
        told = json.loads(go_on().partition(b"\r\n\r\n")[2])
        others = [told["symbols"][0] | {"symbol": f"OTHER{n}USDT"} for n in range(1_000)]
        return said({"symbols": [*others, *told["symbols"]]})

    relay.once("GET", INFO, longer)

    code, text = run(demo, "币安人生USDT")

    assert code == 0, text
    assert "sell 67 币安人生USDT at 0.075," in text
    assert relay.order().symbol == "币安人生USDT"


def test_json_is_one_object(demo: dict[str, str], relay: Relay) -> None:
    """With --json stdout holds one ASCII object with every call, the order and the outcome; people read stderr."""
    done = python("-m", "worker", "rehearse", "--json", **demo)

    assert done.returncode == 0, done.stderr
    assert_no_secret(done.stdout + done.stderr)
    assert done.stdout.isascii()
    told = json.loads(done.stdout)
    assert (told["result"], told["exit_code"], told["order_status"]) == ("passed", 0, "CANCELED")
    assert (told["algo_id"], told["outcome"]["kind"]) == (relay.order().algo_id, "cancelled")
    assert told["order"]["type"] == "STOP_MARKET"
    calls = [(call["method"], call["status"]) for call in told["calls"] if call["path"] == ORDER]
    assert calls == [("POST", 200), ("DELETE", 200), ("GET", 200)]
    assert "passed: " in done.stderr


# ---- where it goes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "more"),
    [
        ("https://fapi.binance.com", {}),
        ("https://fapi.binance.com:443", {}),
        ("https://FAPI.binance.com", {}),
        ("https://api.binance.com", {}),
        ("https://dapi.binance.com", {}),
        ("https://evil.demo-fapi.binance.com", {}),
        ("https://demo-fapi.binance.com:8443", {}),
        ("https://binancefuture.com", {}),
        ("https://demo-fapi.binance.com.evil.example", {"BINANCE_ALLOWED_HOST": "demo-fapi.binance.com.evil.example"}),
        ("https://localhost.evil.example", {"BINANCE_ALLOWED_HOST": "localhost.evil.example"}),
        ("https://10.0.0.1", {"BINANCE_ALLOWED_HOST": "10.0.0.1"}),
        ("https://127.0.0.1:8443", {"EGRESS_PROXY_URL": "http://proxy.example:3128"}),
        ("http://demo-fapi.binance.com", {}),
        ("https://user@demo-fapi.binance.com", {}),
        ("https://demo-fapi.binance.com@fapi.binance.com", {}),
        ("https://demo-fapi.binance.com/@fapi.binance.com", {}),
        ("https://demo-fapi.binance.com.", {}),
        ("https://demo-fapi.binance.com\\@fapi.binance.com", {}),
    ],
)
def test_no_other_host_is_asked(url: str, more: dict[str, str], demo: dict[str, str]) -> None:
    """Whatever is set, an order goes to demo hosts and loopback alone: production and look-alikes are refused."""
    try:
        settings = Settings.from_env(demo | {"BINANCE_BASE_URL": url} | more)
    except SettingsError:
        return
    assert (reason := why_not_there(settings)) is not None
    assert settings.base_url in reason


@pytest.mark.parametrize(
    "url",
    [
        *("https://demo-fapi.binance.com", "https://DEMO-fapi.binance.com/", "https://testnet.binancefuture.com:443"),
        *("http://localhost:8080", "http://127.0.0.1", "https://[::1]:1"),
    ],
)
def test_demo_hosts_and_loopback_are_asked(url: str, demo: dict[str, str]) -> None:
    """These are the hosts on which an order may be placed."""
    assert why_not_there(Settings.from_env(demo | {"BINANCE_BASE_URL": url})) is None


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({}, "BINANCE_BASE_URL is 'https://fapi.binance.com'"),
        (
            {"BINANCE_BASE_URL": "https://demo-fapi.binance.com.evil.example"}
            | {"BINANCE_ALLOWED_HOST": "demo-fapi.binance.com.evil.example"},
            "BINANCE_BASE_URL is 'https://demo-fapi.binance.com.evil.example'",
        ),
        ({"BINANCE_BASE_URL": "http://demo-fapi.binance.com"}, "BINANCE_BASE_URL is 'http://demo-fapi.binance.com'"),
        ({"BINANCE_BASE_URL": "https://demo-fapi.binance.com", "BINANCE_API_KEY": ""}, "BINANCE_API_KEY"),
    ],
    ids=["production", "look-alike", "plain http", "no key"],
)
def test_a_wrong_setting_is_refused_before_anything_is_sent(
    more: dict[str, str], names: str, demo: dict[str, str]
) -> None:
    """It ends with 78 and the setting's name, value and way out, before Redis or an exchange is asked."""
    away = {name: value for name, value in demo.items() if name != "BINANCE_BASE_URL"}
    done = python("-m", "worker", "rehearse", **away | {"REDIS_URL": f"redis://127.0.0.1:{free_port()}/0"} | more)

    assert done.returncode == 78, done.stdout + done.stderr
    assert names in done.stdout + done.stderr
    assert " > " not in done.stdout


def test_a_redirect_is_not_followed(demo: dict[str, str], relay: Relay) -> None:
    """An answer that sends elsewhere is an answer like any other, and nobody is asked there."""
    with Server(lambda peer: peer.send(http_answer(b"{}"))) as elsewhere:
        relay.answer("POST", ORDER, http_answer(b"", "307 Temporary Redirect", Location=f"{elsewhere.url}{ORDER}"))
        code, text = run(demo | {"BINANCE_RECV_WINDOW_MS": "1000"})
    assert code == 69, text
    assert elsewhere.connections == 0


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (lambda exchange: exchange.set_mark_price("BTCUSDT", "100"), -2021, "it would trigger at once"),
        (lambda exchange: exchange.set_hedge_mode(), -4061, "does not fit the account's position mode"),
    ],
    ids=["price", "mode"],
)
def test_what_changes_before_the_order_is_placed_is_explained(
    change: Callable[[RunningExchange], None], code: int, says: str, demo: dict[str, str], relay: Relay
) -> None:
    """A price that falls, or a position mode that changes, after it was read: the refusal says so."""
    relay.before("POST", ORDER, lambda: change(relay.exchange))

    ended, text = run(demo)

    assert ended == 1, text
    last = text.splitlines()[-1]
    assert last.startswith(f"failed: the order is refused: 400 {code} ")
    assert says in last
    assert relay.exchange.book() == {}


@pytest.mark.parametrize(
    ("method", "path", "answer", "code", "says"),
    [
        ("GET", OPEN_ORDERS, refusal(-2015, status="401 No"), 78, "the key of default is refused: 401 -2015"),
        ("POST", ORDER, refusal(-2015, status="401 No"), 78, "the key of default is refused: 401 -2015"),
        ("GET", TIME, http_answer(b"<html>", "451 No"), 69, "this region is refused"),
        ("GET", MARK, refusal(-1003, status="429 No"), 69, "too many requests from this address: wait"),
        ("POST", ORDER, refusal(-1003, status="418 No"), 69, "this address is banned"),
        ("GET", MODE, said({"dualSidePosition": "false"}), 1, "neither true nor false"),
        ("GET", MARK, said({"symbol": "BTCUSDT", "markPrice": "0.0"}), 1, "markPrice is '0.0'"),
        ("GET", INFO, said({"symbols": [SYMBOL]}), 1, "no filter PRICE_FILTER"),
        ("GET", INFO, said({"symbols": [SYMBOL | {"status": "SETTLING"}]}), 1, "BTCUSDT is 'SETTLING', not TRADING"),
        ("GET", OPEN_ORDERS, refusal(-1121), 2, "--symbol 'BTCUSDT': the exchange does not know it"),
        ("GET", INFO, said({"symbols": []}), 2, "--symbol 'BTCUSDT': the exchange does not know it"),
        *(
            ("POST", ORDER, refusal(n, "Its words."), 1, f"failed: the order is refused: 400 {n} Its words.; {means}")
            for n, means in {
                -2019: "the margin is not sufficient: fund the account",
                -2022: "a reducing order is refused: the exchange wants a position that it can reduce",
                -1013: "price or quantity break a rule of the symbol",
                -4014: "the price is no multiple of the symbol's tick",
                -4164: "its notional value is below the symbol's least",
                -4999: "look it up in the exchange's list of errors",
            }.items()
        ),
    ],
)
def test_what_keeps_the_order_from_being_placed_is_named(
    method: str, path: str, answer: bytes, code: int, says: str, demo: dict[str, str], relay: Relay
) -> None:
    """A refused key or order, a ban, a strange answer: each has its exit code, its words and what they mean, and no
    order is left."""
    relay.answer(method, path, answer)

    ended, text = run(demo)

    assert (ended, says in text) == (code, True), text
    assert relay.exchange.book() == {}


def test_an_account_without_a_key_is_named(demo: dict[str, str]) -> None:
    """An account that this environment has no key for is a bad setting; those that it has are named."""
    code, text = run(demo, account="desk")

    assert code == 78
    assert "--account 'desk' has no key here" in text
    assert text.endswith(": default")


@pytest.mark.parametrize("away", [{"REDIS_URL": "redis://127.0.0.1:1"}, {"BINANCE_BASE_URL": "http://127.0.0.1:1"}])
def test_what_is_away_is_named(away: dict[str, str], demo: dict[str, str]) -> None:
    """A Redis or an exchange that is not there ends it with 69 and a line."""
    code, text = run(demo | away)

    assert code == 69
    assert "127.0.0.1:1" in text.splitlines()[-1]


def test_a_suspended_redis_is_named(demo: dict[str, str], connection: redis.Redis) -> None:
    """Where `rq suspend` holds no worker works: that is said before an order is placed."""
    connection.set(Keys().suspended, "1")

    code, text = run(demo)

    assert code == 69
    assert "`rq suspend` holds" in text


def test_missing_rights_are_named(demo: dict[str, str], valkey: Valkey, peek: Peek, relay: Relay) -> None:
    """A worker's user of Redis lacks rights on the rehearsal's own keys, and is told which."""
    (line,) = (line for line in acl_lines(Keys()) if line.startswith("ACL SETUSER worker "))
    peek(*line.split(), "nopass")
    try:
        code, text = run(demo | {"REDIS_URL": valkey.url.replace("//", "//worker:any@")})
    finally:
        peek("ACL", "DELUSER", "worker")
    assert code == 69
    assert re.search(r"lacks rights .*key acq-rehearsal-", text), text
    assert relay.exchange.book() == {}


def test_what_quotes_the_request_gives_nothing_away(demo: dict[str, str], relay: Relay) -> None:
    """An edge that quotes the request, key and signature with it, and colours the terminal, is shown without."""
    told: list[str] = []

    def quote(peer: Peer) -> None:
        while head := peer.read_head():
            told.append(head.decode())
            body = b'{"serverTime":1750485492076}' if TIME.encode() in head else b"\x1b[31m<html>" + head
            peer.send(http_answer(body, "200 OK" if TIME.encode() in head else "500 Oops"))

    with Server(quote) as server:
        code, text = run(demo | {"BINANCE_BASE_URL": server.url})
    assert code == 69
    assert "<html>" in text
    assert "\x1b" not in text
    signatures = re.findall(r"signature=([0-9a-f]{64})", "".join(told))
    assert signatures
    assert not any(signature in text for signature in signatures)


# ---- what is not believed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hook",
    [
        lost,
        lambda go_on: (go_on(), http_answer(b"<html>"))[1],
        lambda go_on: (go_on(), refusal(-2021))[1],
        lambda go_on: (go_on(), refusal(-1007, status="408 No"))[1],
    ],
    ids=["lost", "no JSON", "refused", "timeout"],
)
def test_an_order_that_was_placed_in_spite_of_its_answer_is_found(
    hook: Hook, demo: dict[str, str], relay: Relay
) -> None:
    """Neither a lost answer to the placing nor a refusal is believed: the order is looked up, and the rehearsal goes
    on."""
    relay.once("POST", ORDER, hook)

    code, text = run(demo)

    assert code == 0, text
    assert len(relay.asked("POST")) == 1
    assert relay.order().status == "CANCELED"


def test_an_order_that_never_shows_up_is_no_verdict(demo: dict[str, str], relay: Relay) -> None:
    """Where placing got no clear answer and the order does not show up, it is looked for until it can be accepted no
    more, and it is not placed again."""
    relay.answer("POST", ORDER, http_answer(b"", "504 Gateway Timeout"))

    code, text = run(demo | {"BINANCE_RECV_WINDOW_MS": "1000"})

    assert code == 69, text
    assert "placing the order got no clear answer" in text
    assert len(relay.asked("POST")) == 1


def test_passing_troubles_are_passed(demo: dict[str, str], relay: Relay) -> None:
    """Overload, a clock that is off and an answer without JSON are asked again."""
    relay.once("GET", OPEN_ORDERS, lambda _: refusal(-1021))
    relay.once("POST", ORDER, lambda _: refusal(-1008, status="503 Busy"))
    mode = said({"dualSidePosition": False})
    turns = iter([http_answer(b"<html>"), refusal(-1000, status="500 No")])
    relay.hooks["GET", MODE] = lambda _: next(turns, mode)

    code, text = run(demo)

    assert code == 0, text
    assert len(relay.exchange.book()) == 1


def test_a_cancel_that_was_not_carried_out_is_a_failure(demo: dict[str, str], relay: Relay) -> None:
    """An exchange that says it has cancelled, and shows the order open, fails the rehearsal; the order is taken
    back."""

    def lie(_: GoOn) -> bytes:
        order = relay.order()
        return said({"algoId": order.algo_id, "clientAlgoId": order.client_algo_id, "code": "200", "msg": "success"})

    relay.once("DELETE", ORDER, lie)

    code, text = run(demo)

    assert code == 1, text
    assert text.splitlines()[-1].startswith("failed: ")
    assert relay.order().status == "CANCELED"


def test_a_list_that_lags_is_read_again(demo: dict[str, str], relay: Relay) -> None:
    """The order may stand among the open ones for a moment after a query has shown it cancelled."""
    lists = iter([pass_on, lambda _: said([{"clientAlgoId": relay.order().client_algo_id}])])
    relay.hooks["GET", OPEN_ORDERS] = lambda go_on: next(lists, pass_on)(go_on)

    code, text = run(demo)

    assert code == 0, text
    assert len([target for target in relay.asked("GET") if target.startswith(OPEN_ORDERS)]) == 3


# ---- what shows nothing ----------------------------------------------------------------------------------------------

Move = Callable[[RunningExchange, int], None]


@pytest.mark.parametrize(
    ("move", "code", "says"),
    [
        (RunningExchange.cancel, 75, "inconclusive: the order was gone"),
        (RunningExchange.expire, 75, "inconclusive: the order was gone"),
        (lambda exchange, algo_id: exchange.trigger(algo_id, triggered_after_ms=None), 75, "stuck TRIGGERING"),
        (RunningExchange.trigger, 1, "failed: the order triggered"),
    ],
    ids=["cancelled", "expired", "stuck", "triggered"],
)
def test_what_becomes_of_the_order_before_our_cancel(
    move: Move, code: int, says: str, demo: dict[str, str], relay: Relay
) -> None:
    """What the demo exchange drops by itself, or leaves TRIGGERING, shows neither that a cancel works nor that it does
    not; a stop that triggered far from the market is to be looked at, with the position."""
    relay.before("DELETE", ORDER, lambda: move(relay.exchange, relay.order().algo_id))

    ended, text = run(demo | {"CANCEL_DEADLINE_S": "1"})

    assert ended == code, text
    assert says in text.splitlines()[-1]
