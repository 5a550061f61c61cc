"""The operators' pages in a real browser: what a person does, and what strangers' words may not do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.resources import files
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import redis
from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException, WebDriverException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys as Press

from producer import CancelClient
from producer.message import OutcomeKind
from tests.browser import chromium, look
from tests.holders import OpenHolder, ended, later, orders
from tests.servers import Valkey, Workers, eventually, stopped
from tests.strategies import fail
from tests.webpages import HOSTILE, KEYS, LARGEST, TOKEN, WebProcess, attempt, outcome, settle
from worker.sandbox.control import RunningExchange

pytestmark = pytest.mark.browser

PATHS = (
    *("/", "/?live=1", "/?refresh=0", "/queued", "/scheduled", "/in-flight", "/outcomes", "/outcomes?tag=none"),
    *("/failed", "/history", "/search", "/search?q=x"),
)
#: What is answered with an error.
WRONG = ("/outcomes?from=x&kind=y", "/nothing")
#: The engine of axe, as a script.
AXE = files("axe_playwright_python").joinpath("axe.min.js").read_text("utf-8")


@pytest.fixture(scope="module")
def _browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def browser(_browser: webdriver.Chrome) -> webdriver.Chrome:
    """A real Chromium that knows nobody."""
    _browser.delete_all_cookies()
    look(_browser, 1100)
    _browser.get_log("browser")  # type: ignore[no-untyped-call]
    return _browser


@pytest.fixture
def web(valkey: Valkey) -> Iterator[WebProcess]:
    """The real server, with a login."""
    with WebProcess(valkey.url, WEB_TOKEN=TOKEN) as process:
        yield process


def words(browser: webdriver.Chrome) -> str:
    """What a person can read, blanks made one; nothing while one page makes room for the next."""
    try:
        told = browser.find_element(By.TAG_NAME, "body").text
        for frame in browser.find_elements(By.TAG_NAME, "iframe"):
            browser.switch_to.frame(frame)
            told += " " + browser.find_element(By.TAG_NAME, "body").text
        return " ".join(told.split())
    except (NoSuchElementException, StaleElementReferenceException):
        return ""
    except WebDriverException as error:  # the same, as another part of the browser puts it
        if "does not belong to the document" not in str(error):
            raise
        return ""
    finally:
        browser.switch_to.default_content()


def click(browser: webdriver.Chrome, selector: str, then: Callable[[str], object]) -> str:
    """Press what is there, and wait for the words that follow."""
    browser.find_element(By.CSS_SELECTOR, selector).click()
    eventually(lambda: then(words(browser)), what=f"after {selector}: {words(browser)}")
    return words(browser)


def log_in(browser: webdriver.Chrome, web: WebProcess, path: str = "/") -> None:
    """Ask for a page, and answer the question for the token."""
    browser.get(web.url + path)
    browser.find_element(By.NAME, "token").send_keys(TOKEN)
    click(browser, "form.login button", lambda text: "Log out" in text)


def complaints(browser: webdriver.Chrome) -> list[str]:
    """What the browser reports, apart from the 401 of a page before its login."""
    said: list[dict[str, Any]] = browser.get_log("browser")  # type: ignore[no-untyped-call]
    return [entry["message"] for entry in said if entry["level"] != "DEBUG" and "401" not in entry["message"]]


def test_an_operator_finds_an_order_reads_why_and_retries_it(
    browser: webdriver.Chrome, web: WebProcess, client: CancelClient, workers: Workers, exchange: RunningExchange
) -> None:
    """Login leads to the page that was asked for; status, search by a 64-bit id, and the attempts of that request. Its
    history opens on demand; a retry goes through its confirmation to a new run; logging out ends it."""
    workers.start(NOT_FOUND_HORIZON_S="0.2")
    (order,) = exchange.add_orders()
    client.cancel(algo_id=order.algo_id).wait(30)
    ticket, other = (client.cancel(algo_id=algo_id, symbol="BTCUSDT") for algo_id in (LARGEST, LARGEST - 1))
    assert {each.wait(30).run for each in (ticket, other)} == {1}

    log_in(browser, web, "/?refresh=0")
    assert browser.current_url == f"{web.url}/?refresh=0"
    text = words(browser)
    assert "failed 2" in text
    assert "Workers (1)" in text
    assert f"cancelled {order.algo_id} default" in text
    browser.find_element(By.ID, "find").send_keys(str(LARGEST), Press.ENTER)
    eventually(lambda: "Looked at open requests" in words(browser), what="the search is answered")
    assert f"not_found {LARGEST} default BTCUSDT" in words(browser)
    text = click(browser, "td a.id", lambda text: "verdict ms" in text)
    assert f"Request {ticket.id}" in text
    assert "cancel 400 -2011 Unknown order sent. no_such_order" in text
    assert "query 400 -2013 Order does not exist. no_such_order" in text
    browser.get(web.url + "/failed")
    assert "Unknown order sent." not in words(browser)
    click(browser, "details summary", lambda text: "Unknown order sent." in text)
    text = click(browser, f"td a[href*='retry?id={ticket.id}']", lambda text: "Retry 1 request?" in text)
    assert str(LARGEST) in text
    assert str(LARGEST - 1) not in text
    click(browser, "form button.act", lambda text: "Retried 1 of 1." in text)
    assert client.wait(ticket.id, 10).run == 2
    assert client.outcomes_of([other.id])[other.id].run == 1
    click(browser, "header form[method=post] button", lambda text: "Log out" not in text)
    browser.get(web.url + "/failed")
    assert "Log in" in words(browser)
    assert complaints(browser) == []


def test_strangers_words_stay_words(
    browser: webdriver.Chrome, web: WebProcess, connection: redis.Redis, client: CancelClient
) -> None:
    """Whatever stands in tags, ids, messages, errors and names: no dialog, no script, no stranger's address."""
    for number, bad in enumerate(HOSTILE):
        fields = {"symbol": bad, "tag": bad, "client_algo_id": bad, "account": bad, "worker": bad, "error": bad}
        settle(connection, outcome(f"r{number}", attempts=(attempt(msg=bad, verdict=bad),), **fields))
        settle(connection, outcome(bad, kind=OutcomeKind.REFUSED), raw=bad)
        client.cancel(algo_id=100 + number, tag=bad[:64])
        connection.sadd("rq:workers:cancels", f"rq:worker:{bad}")
        worker: dict[Any, Any] = {"last_heartbeat": "2100-01-01T00:00:00.000000Z", "hostname": bad, "state": bad}
        connection.hset(f"rq:worker:{bad}", mapping=worker)
    connection.hset(KEYS.gate("all"), mapping={"until_ms": 2**42, "reason": HOSTILE[0], "by": HOSTILE[1]})

    log_in(browser, web, "/failed")
    for path in (*PATHS, "/requests/r0?refresh=0", "/retry", "/search?q=17", "/search?q=100"):
        browser.get(web.url + path)
        assert words(browser)
        for details in browser.find_elements(By.CSS_SELECTOR, "details"):
            browser.execute_script("arguments[0].open = true", details)
        assert browser.current_url.startswith(web.url)
        assert (
            browser.find_elements(
                By.CSS_SELECTOR,
                "main :is(script, img, base, link, meta), main svg:not(figure svg), iframe:not([src^='/?'])",
            )
            == []
        )
        assert not browser.execute_script("return window.name || document.querySelector('[onload],[onerror]')")
    for bad in HOSTILE:
        browser.get(f"{web.url}/search")
        browser.find_element(By.CSS_SELECTOR, "main input[name=q]").send_keys(bad, Press.ENTER)
        eventually(lambda: "Looked at open requests" in words(browser), what="the search is answered")
        assert bad in browser.find_element(By.TAG_NAME, "main").text
    assert complaints(browser) == []
    browser.execute_script("document.body.append(Object.assign(document.createElement('script'), {text: 'name = 1'}))")
    assert "script-src 'none'" in complaints(browser)[0]  # even what got in would not run, and would be reported
    assert browser.execute_script("return window.name") == ""


def test_pages_fit_a_phone(
    browser: webdriver.Chrome,
    web: WebProcess,
    connection: redis.Redis,
    client: CancelClient,
    workers: Workers,
    tmp_path: Path,
) -> None:
    """At 390 pixels no page is wider than the window, even with the longest ids and words; the wide parts scroll."""
    long = {"client_algo_id": "x" * 36, "tag": "t" * 64, "symbol": "S" * 32, "account": "a" * 32, "error": "e" * 200}
    fail(client, workers, 2)
    settle(connection, outcome("r1", algo_id=LARGEST, attempts=(attempt(msg="m" * 200),) * 3, **long))
    settle(connection, outcome("w" * 200), raw="{" + "x" * 500)
    log_in(browser, web)
    look(browser, 390)
    for path in (*PATHS, *WRONG, "/requests/r1", "/retry", f"/search?q={LARGEST}"):
        browser.get(web.url + path)
        for details in browser.find_elements(By.CSS_SELECTOR, "details"):
            browser.execute_script("arguments[0].open = true", details)
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= 390, path


def test_what_is_typed_outlasts_the_refresh(browser: webdriver.Chrome, web: WebProcess, client: CancelClient) -> None:
    """The figures look again beside the search box, on the status and on an open request: neither words nor focus are
    lost, and where somebody has scrolled to stays."""
    ticket = client.cancel(algo_id=LARGEST)
    log_in(browser, web)
    look(browser, 1100, height=500)
    scrolled = "return document.querySelector('iframe').contentWindow.scrollY"
    for path in ("/", f"/requests/{ticket.id}"):
        browser.get(web.url + path)
        eventually(lambda: "pause" in words(browser), what="the figures are there")
        box = browser.find_element(By.ID, "find")
        box.click()
        browser.execute_script("document.querySelector('iframe').contentWindow.scrollTo(0, 60)")
        for part in (str(LARGEST)[:4], str(LARGEST)[4:9]):
            ActionChains(browser).send_keys(part).perform()
            await_redrawing(browser)
        ActionChains(browser).send_keys(str(LARGEST)[9:]).perform()
        assert box.get_attribute("value") == str(LARGEST)
        if path == "/":
            eventually(lambda: browser.execute_script(scrolled) == 60, what="the figures are where they were")
        ActionChains(browser).send_keys(Press.ENTER).perform()
        eventually(lambda: "Looked at open requests" in words(browser), what="the search is answered")
        assert str(LARGEST) in browser.find_element(By.TAG_NAME, "main").text
    browser.get(web.url + "/")
    eventually(lambda: "queued 1" in words(browser), what="the figures are there")
    browser.execute_script("document.querySelector('iframe').contentDocument.querySelector('.head a').click()")
    eventually(lambda: browser.current_url == f"{web.url}/?refresh=0", what="the pause is a page of its own")
    assert browser.find_elements(By.TAG_NAME, "iframe") == []
    assert "queued 1" in words(browser)
    assert complaints(browser) == []


def await_redrawing(browser: webdriver.Chrome) -> None:
    """Wait until the document in the frame is another one."""

    def made_at() -> Any:
        return browser.execute_script("return document.querySelector('iframe').contentWindow.performance.timeOrigin")

    before = made_at()
    eventually(lambda: made_at() not in (None, before), what="the figures are drawn anew")


def test_axe_finds_nothing(
    browser: webdriver.Chrome,
    web: WebProcess,
    valkey: Valkey,
    connection: redis.Redis,
    client: CancelClient,
    open_holder: OpenHolder,
) -> None:
    """Each page, errors too, in light and dark, on a phone and a desk: no violation of any of axe's rules."""
    seconds, _ = connection.time()
    tickets = orders(client, 4, tag="grid-7", symbol="BTCUSDT")
    for lease in (leases := open_holder().claim(3))[:2]:
        open_holder().complete(ended(lease, OutcomeKind.TRIGGERED) if lease is leases[0] else later(lease))
    for number, kind in enumerate(OutcomeKind):
        settle(connection, outcome(f"r{number}", kind=kind, finished_at_ms=seconds * 1000))
    connection.hset(KEYS.gate("all"), mapping={"until_ms": (seconds + 600) * 1000, "reason": "429", "by": "host.1"})
    connection.set(KEYS.suspended, 1)
    connection.sadd(KEYS.suspects, "desk2")
    connection.hset(KEYS.breaker("desk2"), mapping={"failures": 5, "reason": "401 -2015", "since_ms": seconds * 1000})
    beat: dict[Any, Any] = {"last_heartbeat": "2026-11-22T10:30:42.000000Z", "hostname": "h", "c_concurrency": 64}
    connection.hset(KEYS.worker_prefix + "dead", mapping=beat)
    connection.sadd(KEYS.queue_workers, KEYS.worker_prefix + "dead")
    ways = cycle(((("light", 390), ("dark", 1100)), (("dark", 390), ("light", 1100))))
    found = [violations(browser, web.url + path, *next(ways)) for path in ("/login", "/failed")]
    log_in(browser, web)
    for path in (
        *PATHS,
        *WRONG,
        "/retry?id=r6",
        f"/requests/{tickets[1].id}?live=1",
        "/requests/r6",
        "/search?q=1&account=x",
    ):
        found.append(violations(browser, web.url + path, *next(ways)))
    with stopped(valkey):
        found.append(violations(browser, web.url + "/failed", *next(ways)))
    assert [words for each in found for words in each] == []


def violations(browser: webdriver.Chrome, address: str, *ways: tuple[str, int]) -> list[str]:
    """What axe objects to on a page, all of it opened, in each of these colour schemes and widths."""
    browser.get(address)
    browser.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
    browser.execute_script(AXE)
    for frame in browser.find_elements(By.TAG_NAME, "iframe"):
        browser.switch_to.frame(frame)
        browser.execute_script(AXE)
        browser.switch_to.default_content()
    found = []
    for scheme, pixels in ways:
        look(browser, pixels, scheme)
        told = browser.execute_async_script(
            "const done = arguments[0], of = each => each.id + ': ' + each.nodes.map(node => node.html).join(' and ');"
            "axe.run({preload: false})"
            ".then(found => done(found.violations.map(of)), failed => done([`${failed}`]))"
        )
        found += [f"{address} {scheme} {pixels}: {each}" for each in told]
    return found


def test_everything_can_be_reached_by_the_keyboard(
    browser: webdriver.Chrome, web: WebProcess, connection: redis.Redis
) -> None:
    """Tab goes from the skip link through the links to each request, each history and each retry, visibly."""
    settle(connection, outcome("r1"))
    log_in(browser, web, "/failed")
    reached = []
    for _ in range(35):
        browser.switch_to.active_element.send_keys(Press.TAB)
        element = browser.switch_to.active_element
        reached.append(element.get_attribute("name") or element.text or element.tag_name)
        assert element.value_of_css_property("outline-style") != "none" or element.tag_name == "body"
    for wanted in ("Status", "Failed", "q", "kind", "account", "from", "Retry all 1…", "r1", "Retry…"):
        assert wanted in reached
    assert any("1 attempt" in name for name in reached)
