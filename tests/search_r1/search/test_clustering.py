from __future__ import annotations

import numpy as np

from search_r1.search.clustering import find_nearest, train_centroids, train_codebooks
from tests.search_r1.search.vectors import make_vectors, normalise


def test_clusters_that_are_there_are_found() -> None:
    generator = np.random.default_rng(0)
    centres = normalise(generator.standard_normal((8, 32)))
    sample = normalise(np.repeat(centres, 100, axis=0) + 0.02 * generator.standard_normal((800, 32)))
    centroids = train_centroids(sample, count=16, seed=0)
    best, _ = find_nearest(centres, centroids, num_found=1)
    assert best.min() > 0.99
    assert np.abs(np.linalg.norm(centroids, axis=1) - 1).max() < 1e-5


def test_more_centroids_than_vectors_and_equal_vectors_do_not_break_it() -> None:
    centroids = train_centroids(make_vectors(3, 16), count=5, seed=0)
    assert np.isfinite(centroids).all()
    books = train_codebooks(np.ones((10, 16), dtype=np.float32), num_parts=4, seed=0)
    assert books.shape == (4, 256, 4)
    assert (books == 1).all()


def test_the_nearest_are_found_best_first() -> None:
    vectors, centroids = make_vectors(100, 16), make_vectors(30, 16, seed=5)
    scores, rows = find_nearest(vectors, centroids, num_found=4)
    exact = vectors @ centroids.T
    assert (rows == np.argsort(-exact, axis=1)[:, :4]).all()
    assert np.abs(scores - np.take_along_axis(exact, rows, axis=1)).max() < 1e-6
    assert (find_nearest(vectors, centroids, num_found=1)[1][:, 0] == rows[:, 0]).all()


def test_codebooks_approximate_what_they_were_trained_on() -> None:
    vectors = make_vectors(5000, 32)
    residuals = vectors - vectors.mean(axis=0)
    books = train_codebooks(residuals, num_parts=16, seed=0)
    parts = residuals.reshape(-1, 16, 2)
    errors = [((parts[:, part, None] - books[part][None]) ** 2).sum(-1).min(1).sum() for part in range(16)]
    assert sum(errors) < 0.02 * (residuals**2).sum()
