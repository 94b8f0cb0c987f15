"""``reflective.evaluate.compute_metric`` by the name that users import."""

from .evaluate.compute_metric import TASKS, answer, boxed, find_task, refuse_programs, task, verdict

__all__ = ["TASKS", "answer", "boxed", "find_task", "refuse_programs", "task", "verdict"]
