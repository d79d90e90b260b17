"""Progress is shown in the trainer's bar, to its end, and on rank zero alone."""

from __future__ import annotations

import pytest
from fake_trainer import FakeTrainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from plain_runs import AtTheEnd, Plain, at_the_end, loader
from toy import trainer

from bmoe_lightning.trainer.data_passes import training_pass
from bmoe_lightning.trainer.progress import LoopProgressLines, ProgressLines, print_line, progress


class TestProgress:
    def fake(self, bar, **options):
        return FakeTrainer(progress_bar_callback=bar, **options)

    def test_rich_task_is_done_at_the_end(self, tmp_path, capsys):
        bar = RichProgressBar()

        def look(t):
            steps = []
            for _ in training_pass(t, "Looking around"):
                steps.append(bar.progress.tasks[-1].completed)
            return steps, bar.progress.tasks[-1]

        probe = AtTheEnd(look)
        trainer(tmp_path, [probe, bar], max_epochs=1, enable_progress_bar=True).fit(Plain(), loader())
        steps, task = probe.result
        assert steps == [0, 1, 2]
        assert (task.description, task.total, task.completed) == ("Looking around", 3, 3)

    def test_tqdm_counts_to_the_end(self, capsys, monkeypatch):
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        with progress(self.fake(TQDMProgressBar()), 3, "Looking around") as advance:
            for _ in range(3):
                advance()
        shown = "".join(capsys.readouterr())
        assert "Looking around" in shown
        assert "3/3" in shown

    @pytest.mark.parametrize(
        "case", ["no bar", "disabled rich", "disabled tqdm", "rich before it began", "a bar of one's own", "other rank"]
    )
    def test_silent(self, case, capsys):
        bars = {"no bar": None, "disabled rich": RichProgressBar(), "disabled tqdm": TQDMProgressBar()}
        bars |= {"rich before it began": RichProgressBar(), "a bar of one's own": ProgressBar()}
        run = self.fake(bars.get(case, TQDMProgressBar()))
        if case.startswith("disabled"):
            run.progress_bar_callback.disable()
        if case == "other rank":
            run.is_global_zero = False
        with progress(run, 3, "Looking around") as advance:
            advance()
        assert "".join(capsys.readouterr()) == ""

    @pytest.mark.parametrize("is_terminal", [True, False])
    @pytest.mark.parametrize("bar", [TQDMProgressBar, ProgressBar, None])
    def test_lines(self, capsys, monkeypatch, bar, is_terminal):
        monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal, raising=False)
        run = self.fake(None if bar is None else bar())
        print_line(run, "100 % of [it]")
        run.is_global_zero = False
        print_line(run, "again")
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.splitlines() == ["100 % of [it]"]

    def test_lines_above_a_rich_bar(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        probe = AtTheEnd(lambda t: print_line(t, "100 % of [it]"))
        trainer(tmp_path, [probe, RichProgressBar()], max_epochs=1, enable_progress_bar=True).fit(Plain(), loader())
        assert "100 % of [it]" in "".join(capsys.readouterr())

    def test_pass_is_silent_without_a_bar(self, tmp_path, capsys):
        at_the_end(tmp_path, lambda t: capsys.readouterr() and list(training_pass(t, "Looking around")))
        assert "Looking around" not in "".join(capsys.readouterr())


class TestLines:
    @pytest.fixture
    def clock(self, monkeypatch):
        """A clock that the test sets."""
        now = [0.0]
        monkeypatch.setattr("bmoe_lightning.trainer.progress.time.monotonic", lambda: now[0])
        return now

    def test_in_a_log_one_every_half_minute(self, capsys, clock):
        run = FakeTrainer(progress_bar_callback=TQDMProgressBar())
        with progress(run, 100, "Curvature") as advance:
            for _ in range(10):
                clock[0] += 12
                advance()
        assert capsys.readouterr().err.splitlines() == [
            "Curvature: 3/100, 0:36 elapsed, 19:24 left",
            "Curvature: 6/100, 1:12 elapsed, 18:48 left",
            "Curvature: 9/100, 1:48 elapsed, 18:12 left",
        ]

    def test_of_unknown_length(self, capsys, clock):
        lines = ProgressLines("Training", float("inf"))
        clock[0] = 61
        lines.advance()
        assert capsys.readouterr().err == "Training: 1, 1:01 elapsed\n"

    def test_of_the_trainer_s_own_loops(self, tmp_path, capsys, clock):
        class Slow(Plain):
            def on_before_batch_transfer(self, batch, dataloader_idx):
                clock[0] += 20
                return batch

            def training_step(self, batch, batch_idx):
                self.log("loss", 0.25, prog_bar=True)
                return super().training_step(batch, batch_idx)

            def test_step(self, batch, batch_idx):
                pass

        loops = trainer(tmp_path, [LoopProgressLines()], max_epochs=2, enable_progress_bar=True)
        loops.fit(Slow(), loader(), loader())
        loops.test(Slow(), loader(), verbose=False)
        assert [line for line in capsys.readouterr().err.splitlines() if " elapsed" in line] == [
            "Training: 2/6, 0:40 elapsed, 1:20 left, loss 0.25",
            "Validation: 2/3, 0:40 elapsed, 0:20 left",
            "Training: 4/6, 2:20 elapsed, 1:10 left, loss 0.25",
            "Training: 6/6, 3:00 elapsed, 0:00 left, loss 0.25",
            "Validation: 2/3, 0:40 elapsed, 0:20 left",
            "Testing: 2/3, 0:40 elapsed, 0:20 left",
        ]

    def test_none_of_the_trainer_s_own_loops_without_a_bar(self, tmp_path, capsys, clock):
        class Slow(Plain):
            def on_before_batch_transfer(self, batch, dataloader_idx):
                clock[0] += 60
                return batch

        trainer(tmp_path, [LoopProgressLines()], max_epochs=1).fit(Slow(), loader(), loader())
        assert " elapsed" not in capsys.readouterr().err

    @pytest.mark.parametrize("quiet", ["no bar", "disabled", "other rank"])
    def test_none_without_a_bar(self, capsys, clock, quiet):
        bar = None if quiet == "no bar" else TQDMProgressBar()
        run = FakeTrainer(progress_bar_callback=bar, is_global_zero=quiet != "other rank")
        if quiet == "disabled":
            bar.disable()
        with progress(run, 3, "Curvature") as advance:
            clock[0] = 100
            advance()
        assert capsys.readouterr().err == ""
