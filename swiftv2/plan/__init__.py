"""What a run holds, costs and takes, before anything is allocated."""

from swiftv2.plan.model import ModelPlan, plan_model
from swiftv2.plan.run import RunPlan, Work, plan_run

__all__ = ["ModelPlan", "RunPlan", "Work", "plan_model", "plan_run"]
