from petals_server.scheduling import MAX_DECODE_TURNS, Backlog, Urgency


def test_decode_goes_before_bulk_and_each_in_turn() -> None:
    backlog: Backlog[str] = Backlog()
    backlog.push("prefill 1", Urgency.BULK)
    backlog.push("decode 1", Urgency.DECODE)
    backlog.push("prefill 2", Urgency.BULK)
    backlog.push("decode 2", Urgency.DECODE)
    assert len(backlog) == 4
    assert [backlog.pop() for _ in range(5)] == ["decode 1", "decode 2", "prefill 1", "prefill 2", None]


def test_steady_decoding_does_not_starve_a_prefill() -> None:
    backlog: Backlog[str] = Backlog()
    backlog.push("prefill", Urgency.BULK)
    order = []
    for _ in range(2 * MAX_DECODE_TURNS):
        backlog.push("decode", Urgency.DECODE)
        order.append(backlog.pop())
    assert order.count("prefill") == 1
    assert order.index("prefill") == MAX_DECODE_TURNS


def test_decoding_alone_uses_up_nothing() -> None:
    backlog: Backlog[str] = Backlog()
    for _ in range(3 * MAX_DECODE_TURNS):
        backlog.push("decode", Urgency.DECODE)
        assert backlog.pop() == "decode"
    backlog.push("prefill", Urgency.BULK)
    assert backlog.pop() == "prefill"
