"""What a run holds, costs and takes, before anything is allocated."""

from swiftv2.plan.model import ModelPlan, plan_model

__all__ = ["ModelPlan", "plan_model"]
