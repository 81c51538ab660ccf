"""Taking the linear share of covariates out of features and labels, by coefficients of the training rows alone."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def residualise(values: Floats, covariates: Floats, train: NDArray[np.bool_]) -> Floats:
    """What covariates do not explain linearly; the mean of the training rows stays, so that units and level do.

    Held-out rows neither change the coefficients nor the centre: cross-validated confound regression (Snoek et al. 2019,
    NeuroImage 184, 741). Collinear covariates share a coefficient of least norm.

    Args:
        values: (n,) or (n, D); rows of which any value is NaN are not learned from, and NaN stays NaN.
        covariates: (n, C) without NaN; nothing happens where C is 0.
        train: (n,) rows that are learned from.

    Returns:
        An array of the shape of `values`.
    """
    if not covariates.shape[1]:
        return values
    known = train & ~np.isnan(values.reshape(len(values), -1)).any(axis=1)
    centred = covariates - covariates[known].mean(axis=0)
    level = values[known].mean(axis=0)
    # Scaled, so that what counts as collinear does not depend on the units of a column.
    spread = centred[known].std(axis=0)
    scaled = centred / np.where(spread > 0, spread, 1.0)
    coefficients = np.linalg.lstsq(scaled[known], values[known] - level, rcond=None)[0]
    residuals: Floats = values - scaled @ coefficients
    return residuals
