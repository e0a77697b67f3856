"""Write the predictions of a classifier from scikit-learn to Parquet: one row an example, one column per class.

The digits are predicted as they are and under noise, and thick pen strokes are told from thin ones.

    pip install 'moe-posterior[evaluate]'
    python from_sklearn.py                     # writes digits.parquet
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier


def main() -> None:
    draw = np.random.default_rng(0)
    images, digits = load_digits(return_X_y=True)
    order = draw.permutation(len(images))
    images, digits = images[order] / 16, digits[order]
    model = RandomForestClassifier(100, random_state=0).fit(images[:800], digits[:800])

    tables = []
    for shift, noise in (("clean", 0.0), ("noise", 0.3)):
        test = images[800:] + noise * draw.normal(size=images[800:].shape)
        probs = model.predict_proba(test)
        columns = {f"prob_{label}": probs[:, index] for index, label in enumerate(model.classes_)}
        stroke = np.where(images[800:].mean(axis=1) > np.median(images.mean(axis=1)), "thick", "thin")
        tables.append(pa.table({**columns, "label": digits[800:], "shift": [shift] * len(test), "stroke": stroke}))
    path = Path(__file__).with_name("digits.parquet")
    pq.write_table(pa.concat_tables(tables), path)
    print(f"{path.name}: {sum(map(len, tables)):,} rows")


if __name__ == "__main__":
    main()
