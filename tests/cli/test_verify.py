from __future__ import annotations

from tests.cli.running import run


def test_verify_prints_the_table_and_says_by_its_status_whether_all_is_the_same(checkpoint, monkeypatch):
    result = run("verify", checkpoint)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.split()[:2] == ["activation", "difference"]
    assert "hook_logits" in result.stdout
    monkeypatch.setattr("hooked_llava.model.verify.TOLERANCE", -1.0)
    monkeypatch.setattr("hooked_llava.model.verify._ROUNDINGS", -1)
    assert run("verify", checkpoint).exit_code == 1
