"""An enqueue whose answer was lost is made again with the same ids; whatever happened meanwhile, it does no harm."""

from __future__ import annotations

import redis

from producer import CancelClient, CancelRequest, OutcomeKind
from producer.keys import Keys
from producer.message import Outcome
from producer.protocol import Wire, rows
from tests.servers import Valkey
from worker.store import Settlement, Store, connect


def test_a_repeat_after_the_outcome_gives_no_row_a_new_job(
    valkey: Valkey, client: CancelClient, connection: redis.Redis
) -> None:
    """Two requests for one order, enqueued, finished, and enqueued again with the same ids, make no second job."""
    ((batch,),) = rows([CancelRequest(algo_id=7), CancelRequest(algo_id=7)])
    wire = Wire("cancels")
    words = wire._enqueue_words(batch)
    first = connection.eval(wire.enqueue_script.source, *words)
    with connect(valkey.url) as own:
        store = Store(
            own, "cancels", "w", gate_scope="all", lease_ms=8000, deadline_ms=9000, outcome_ttl_s=99, ledger_maxlen=99
        )
        (grant,) = store.claim(2, wait=False).grants
        store.settle([Settlement(grant, outcome=Outcome(grant.id, 1, OutcomeKind.CANCELLED))])

    again = connection.eval(wire.enqueue_script.source, *words)

    assert again == first
    assert connection.llen(Keys().waiting) == 0
    assert len(list(client.outcomes())) == 1
