"""SB3's algorithms with this project's policies: they keep to the batch size, take any number of rows, and learn."""

from __future__ import annotations

import json
import math
import pickle
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation, FrameStackObservation
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecCheckNan

from raise_env import EnvConfig, PickOne, RaiseSelectEnv, TopKScores
from raise_env.agents import sb3
from raise_env.agents.rollout import fit_wrapper, run_episode
from raise_env.agents.sb3 import PRESETS, RowPolicy, Sb3Agent, SubsetPolicy
from raise_env.errors import OutputError, RecordError, SettingError
from raise_env.testing import toy_env, toy_pool

sb3_contrib = pytest.importorskip("sb3_contrib", reason='needs the extra "sb3"')
MaskableRowPolicy = sb3.MaskableRowPolicy

NUM_ROWS, NUM_FEATURES, SIZE, HORIZON = 12, 5, 3, 4


class Bandit(gym.Env[np.ndarray, np.ndarray]):
    """Each round offers new rows; the reward is the mean hidden worth of the chosen ones, and some noise.

    A random choice earns 0 a round, the best one 1.67 on average. It has all three action spaces, as if wrapped:
    a set is taken as it is, of scores the best, and picks are collected.
    """

    def __init__(self, action_space: spaces.Space[Any]) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (NUM_ROWS, NUM_FEATURES), np.float32)
        self.action_space = action_space
        self.config = SimpleNamespace(horizon=HORIZON, batch_size=SIZE)
        self.picked: list[int] = []
        self.sizes: list[int] = []  # of every batch so far
        self.rewards: list[float] = []  # of every batch so far

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.num_rounds = 0
        return self.offer(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if isinstance(self.action_space, spaces.Discrete):
            self.picked.append(int(action))
            if len(self.picked) < SIZE:
                return self.rows.copy(), 0.0, False, False, {}
            chosen = np.unique(self.picked)
        elif isinstance(self.action_space, spaces.Box):
            chosen = np.argsort(-np.asarray(action), kind="stable")[:SIZE]
        else:
            assert np.isin(action, (0, 1)).all()
            chosen = np.flatnonzero(action)
        self.sizes.append(len(chosen))
        reward = float(self.worth()[chosen].sum() / SIZE + 0.1 * self.np_random.normal())
        self.rewards.append(reward)
        self.num_rounds += 1
        return self.offer(), reward, self.num_rounds >= HORIZON, False, {}

    def action_masks(self) -> np.ndarray:
        return ~np.isin(np.arange(NUM_ROWS), self.picked)

    def offer(self) -> np.ndarray:
        self.picked = []
        self.rows = self.np_random.normal(size=(NUM_ROWS, NUM_FEATURES)).astype(np.float32)
        return self.rows.copy()

    def worth(self) -> np.ndarray:
        return self.rows[:, 0] - self.rows[:, 1]


def multibinary() -> Bandit:
    return Bandit(spaces.MultiBinary(NUM_ROWS))


def boxed() -> Bandit:
    return Bandit(spaces.Box(-1.0, 1.0, (NUM_ROWS,), np.float32))


def discrete() -> Bandit:
    return Bandit(spaces.Discrete(NUM_ROWS))


def mean_reward(model: Any, env: Bandit, episodes: int = 20) -> float:
    """The reward a round of the model's best actions, over episodes that it has not seen."""
    total = 0.0
    for episode in range(episodes):
        observation, _ = env.reset(seed=1000 + episode)
        is_over = False
        while not is_over:
            masks = {"action_masks": env.action_masks()} if isinstance(env.action_space, spaces.Discrete) else {}
            action, _ = model.predict(observation, deterministic=True, **masks)
            observation, reward, is_over, _, _ = env.step(action)
            total += reward
    return total / (episodes * HORIZON)


def trained(policy: Any, env: Bandit, num_steps: int = 160, algorithm: Any = PPO, **settings: Any) -> Any:
    model = algorithm(policy, VecCheckNan(DummyVecEnv([lambda: env]), raise_exception=True), seed=0, **settings)
    model.set_logger(Logger(None, []))
    return model.learn(num_steps)


def fresh(policy: Any, env: Bandit, algorithm: Any = PPO, **settings: Any) -> Any:
    return algorithm(policy, env, seed=0, device="cpu", n_steps=8, batch_size=8, **settings)


def subset_model(**policy_kwargs: Any) -> PPO:
    return fresh(SubsetPolicy, multibinary(), policy_kwargs={"subset_size": SIZE, **policy_kwargs})


def rows(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(*shape, NUM_FEATURES)).astype(np.float32)


@pytest.fixture(autouse=True)
def _restore_global_generators() -> Any:
    """SB3 seeds the global generators: no test shall depend on the one before."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(()):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_subset_policy__short_training__chooses_well(algorithm: type[PPO | A2C]) -> None:
    env = multibinary()
    settings = {**PRESETS[algorithm.__name__], "policy_kwargs": {"subset_size": SIZE}}

    assert mean_reward(algorithm(SubsetPolicy, env, seed=0, **settings), env) < 1.0
    assert mean_reward(trained(SubsetPolicy, env, algorithm=algorithm, **settings), env) > 1.4
    assert set(env.sizes) == {SIZE}


def test_row_policy__box_actions__learns_a_ranking() -> None:
    env = boxed()

    assert mean_reward(trained(RowPolicy, env, **PRESETS["PPO"]), env) > 1.4


def test_maskable_row_policy__picks__learns_and_heeds_the_masks() -> None:
    env = discrete()
    settings = {**PRESETS["MaskablePPO"], "n_steps": 160, "gamma": 0.7}

    assert mean_reward(trained(MaskableRowPolicy, env, 640, sb3_contrib.MaskablePPO, **settings), env) > 1.2
    assert set(env.sizes) == {SIZE}


@pytest.mark.parametrize("deterministic", [False, True])
def test_subset_policy__other_number_of_rows__chooses_as_many(deterministic: bool) -> None:
    model = subset_model()
    for observation in (rows(10_000), rows(2 * NUM_ROWS), rows(SIZE - 1)):
        action, _ = model.predict(observation, deterministic=deterministic)

        assert action.shape == observation.shape[:1]
        assert action.dtype == np.int8
        assert action.sum() == min(SIZE, len(observation))


def test_subset_policy__batch_of_observations__acts_on_each() -> None:
    model = subset_model()
    observations = rows(4, 20)
    actions, _ = model.predict(observations, deterministic=True)
    alone = [model.predict(observation, deterministic=True)[0] for observation in observations]

    np.testing.assert_array_equal(actions, alone)


def test_subset_policy__best_action__is_the_top_of_the_scores_in_any_order() -> None:
    model = subset_model()
    observation = rows(50)
    action, _ = model.predict(observation, deterministic=True)
    turned, _ = model.predict(observation[::-1].copy(), deterministic=True)
    scores = model.policy.scores(observation)

    assert scores.shape == (50,)
    assert set(action.nonzero()[0]) == set(scores.topk(SIZE).indices.tolist())
    np.testing.assert_array_equal(turned[::-1], action)


def test_subset_policy__padding__is_never_chosen_nor_valued() -> None:
    model = subset_model()
    padded = np.concatenate([rows(1, 6), np.zeros((1, 30, NUM_FEATURES), np.float32)], axis=1)
    for _ in range(20):
        action, _ = model.predict(padded[0])
        assert action[:6].sum() == SIZE
    few = np.where(np.arange(36)[:, None] < 2, padded[0], 0.0).astype(np.float32)

    assert model.predict(few)[0].nonzero()[0].tolist() == [0, 1]
    values = model.policy.predict_values(torch.as_tensor(padded))
    torch.testing.assert_close(values, model.policy.predict_values(torch.as_tensor(padded[:, :6])))


def test_subset_policy__drawn_actions__keep_their_log_probability() -> None:
    policy = subset_model().policy
    observations = torch.as_tensor(rows(7, NUM_ROWS))
    with torch.no_grad():
        actions, values, log_probs = policy(observations)
    values_again, log_probs_again, entropy = policy.evaluate_actions(observations, actions)
    (log_probs_again.sum() + entropy.sum()).backward()

    torch.testing.assert_close(log_probs_again, log_probs)
    torch.testing.assert_close(values_again, values)
    assert values.shape == (7, 1)
    assert all(torch.isfinite(parameter.grad).all() for parameter in policy.action_net.parameters())


def test_subset_policy__saved_by_sb3__is_the_same_after_loading(tmp_path: Path) -> None:
    model = trained(SubsetPolicy, multibinary(), 16, n_steps=8, batch_size=8, policy_kwargs={"subset_size": SIZE})
    model.save(tmp_path / "model")
    policy_file = tmp_path / "policy"
    model.policy.save(str(policy_file))
    by_parameters = subset_model()
    by_parameters.set_parameters(tmp_path / "model")
    scores = model.policy.scores(rows(30))

    for policy in (PPO.load(tmp_path / "model").policy, by_parameters.policy, SubsetPolicy.load(str(policy_file))):
        torch.testing.assert_close(policy.scores(rows(30)), scores)
        assert policy.predict(rows(30))[0].sum() == SIZE


def test_subset_policy__net_arch__sets_the_hidden_layers() -> None:
    policy = subset_model(net_arch={"pi": [7], "vf": [9, 11]}).policy
    widths = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items() if name.endswith("weight")}

    assert list(widths.values()) == [(7, NUM_FEATURES), (1, 7), (9, NUM_FEATURES), (11, 9), (1, 11)]


@pytest.mark.parametrize(
    ("net_arch", "actor", "critic"),
    [
        ({"pi": [7]}, [(7, NUM_FEATURES), (1, 7)], [(1, NUM_FEATURES)]),
        ({"vf": [9]}, [(1, NUM_FEATURES)], [(9, NUM_FEATURES), (1, 9)]),
        ({"pi": [], "vf": []}, [(1, NUM_FEATURES)], [(1, NUM_FEATURES)]),
        ([], [(1, NUM_FEATURES)], [(1, NUM_FEATURES)]),
    ],
)
def test_row_policy__net_arch_without_layers__is_linear_there(net_arch: Any, actor: Any, critic: Any) -> None:
    model = trained(RowPolicy, boxed(), 16, n_steps=8, batch_size=8, policy_kwargs={"net_arch": net_arch})
    found = [
        [tuple(tensor.shape) for name, tensor in network.state_dict().items() if name.endswith("weight")]
        for network in (model.policy.action_net, model.policy.value_net)
    ]

    assert found == [actor, critic]


@pytest.mark.parametrize(
    ("wrap", "shape"),
    [
        (FlattenObservation, r"\(60,\)"),
        (lambda env: FrameStackObservation(env, 4), r"\(4, 12, 5\)"),
        (lambda env: FrameStackObservation(FlattenObservation(env), 4), r"\(4, 60\)"),
    ],
    ids=["flattened", "stacked", "flattened and stacked"],
)
@pytest.mark.parametrize(
    ("policy", "algorithm", "make"),
    [(RowPolicy, PPO, boxed), (RowPolicy, PPO, discrete), (MaskableRowPolicy, sb3_contrib.MaskablePPO, discrete)],
)
def test_row_wise_policy__observations_that_are_no_rows__are_refused_before_anything_is_built(
    wrap: Any, shape: str, policy: Any, algorithm: Any, make: Any
) -> None:
    with pytest.raises(SettingError, match=rf"shape {shape}; expected \(candidates, features\): leave out wrappers"):
        fresh(policy, wrap(make()), algorithm)


def test_subset_policy__with_trpo__says_what_is_missing() -> None:
    settings = {"n_steps": 8, "batch_size": 8, "policy_kwargs": {"subset_size": SIZE}}
    with pytest.raises(SettingError, match=r"a divergence between two subset laws.* take PPO or A2C"):
        trained(SubsetPolicy, multibinary(), 8, sb3_contrib.TRPO, **settings)


def test_subset_policy__box_actions__is_refused() -> None:
    with pytest.raises(SettingError, match="needs a MultiBinary action space"):
        fresh(SubsetPolicy, boxed(), policy_kwargs={"subset_size": SIZE})


def test_row_policy__state_dependent_exploration__is_refused() -> None:
    with pytest.raises(SettingError, match="leave it out"):
        fresh(RowPolicy, boxed(), use_sde=True)


@pytest.mark.parametrize("make", [multibinary, boxed, discrete])
def test_row_policy__each_action_space__acts_on_any_number_of_rows(make: Any) -> None:
    env = make()
    model = fresh(RowPolicy, env)
    action, _ = model.predict(rows(100))
    batch, _ = model.predict(rows(2, 100), deterministic=True)

    assert action.dtype == env.action_space.dtype
    assert action.shape == (() if make is discrete else (100,))
    assert batch.shape == (2, *action.shape)


def test_row_policy__large_scores_for_box_actions__are_not_clipped_to_ties() -> None:
    model = fresh(RowPolicy, boxed())
    acquisition = model.policy.action_net[0]
    with torch.no_grad():
        acquisition.layers[-1].weight *= 2 / acquisition(torch.as_tensor(rows(100))).std()
    action, _ = model.predict(rows(100), deterministic=True)

    assert np.abs(action).max() < 1
    assert len(np.unique(action)) == 100
    assert action.std() > 0.5


def test_maskable_row_policy__masks_on_any_number_of_rows__are_heeded() -> None:
    model = fresh(MaskableRowPolicy, discrete(), sb3_contrib.MaskablePPO)
    mask = np.zeros(100, dtype=bool)
    mask[[4, 70]] = True
    picks = {int(model.predict(rows(100), action_masks=mask)[0]) for _ in range(50)}

    assert picks == {4, 70}


def toy() -> gym.Env[np.ndarray, np.ndarray]:
    """The real environment, but for the language model, in the bandit's sizes."""
    return toy_env(num_candidates=NUM_ROWS, num_classes=SIZE, batch_size=SIZE, horizon=HORIZON)


ALL_CLASSES = {
    "PPO": ("subset", "scores", "pick", "multibinary"),
    "A2C": ("subset", "scores", "pick", "multibinary"),
    "TRPO": ("scores", "pick", "multibinary"),
    "MaskablePPO": ("pick",),
    "RecurrentPPO": ("scores", "pick"),
    "SAC": ("scores",),
    "TD3": ("scores",),
    "DDPG": ("scores",),
    "TQC": ("scores",),
    "CrossQ": ("scores",),
    "ARS": ("scores", "pick"),
    "DQN": ("pick",),
    "QRDQN": ("pick",),
}


def test_presets__every_algorithm_of_both_libraries__has_one() -> None:
    assert set(PRESETS) == set(ALL_CLASSES)


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, forms in ALL_CLASSES.items() for form in forms])
def test_sb3_agent__each_class_and_form__learns_saves_and_loads(name: str, form: str, tmp_path: Path) -> None:
    told: list[tuple[int, float]] = []
    agent = Sb3Agent(f"sb3:{name}", action_form=form)
    agent.learn(toy(), 2, seed=1, progress=lambda number, total: told.append((number, total)))
    agent.save(tmp_path / "selector")
    loaded = Sb3Agent.load(tmp_path / "selector")

    assert len(told) >= 2
    assert [number for number, _ in told] == list(range(1, len(told) + 1))
    assert loaded.name == agent.name == f"sb3:{name}"
    assert loaded.action_space == agent.action_space
    assert acts(loaded, seed=9) == acts(agent, seed=9)
    assert sorted(path.name for path in (tmp_path / "selector").iterdir()) == ["config.json", "model.safetensors"]


def acts(agent: Sb3Agent, seed: int) -> list[list[int]]:
    """The actions of an episode in the toy world, wrapped as the agent wants it."""
    env = agent.wrap(toy())
    actions, over = [], False
    observation, info = env.reset(seed=seed)
    while not over:
        action, _ = agent.predict(observation, action_masks=info["action_mask"])
        assert env.action_space.contains(action)
        observation, _, over, _, info = env.step(action)
        actions.append(np.asarray(action).tolist())
    return actions


@pytest.mark.parametrize(("name", "forms"), ALL_CLASSES.items())
def test_sb3_agent__no_action_form__takes_the_best_that_fits(name: str, forms: tuple[str, ...]) -> None:
    assert Sb3Agent(name).action_form == forms[0]
    for form in {"subset", "scores", "pick", "multibinary"} - set(forms):
        with pytest.raises(SettingError, match=f"cannot act in the form '{form}'"):
            Sb3Agent(name, action_form=form)


def crowded() -> gym.Env[np.ndarray, np.ndarray]:
    """Ten rows and two places of padding, of which a batch takes eight: whoever picks blindly repeats itself."""
    return toy_env(num_rows=10, num_candidates=NUM_ROWS, num_classes=SIZE, batch_size=8, horizon=HORIZON)


@pytest.mark.parametrize("name", [name for name, forms in ALL_CLASSES.items() if "pick" in forms])
def test_sb3_agent__that_picks__acts_on_full_batches_of_rows_that_are_free(name: str) -> None:
    agent = Sb3Agent(name, action_form="pick").learn(crowded(), 1, seed=0)

    for deterministic in (True, False):
        record = run_episode(crowded(), agent, seed=0, name=name, deterministic=deterministic)
        assert [len(set(chosen)) for chosen in record.actions] == [8] * HORIZON


@pytest.mark.parametrize("name", ["A2C", "QRDQN"])
def test_predict__masks__count_for_one_call(name: str) -> None:
    agent = Sb3Agent(name, action_form="pick").learn(crowded(), 1, seed=0)
    observation, _ = crowded().reset(seed=0)
    best = int(agent.predict(observation)[0])
    mask = np.arange(NUM_ROWS) != best

    assert int(agent.predict(observation, action_masks=mask)[0]) != best
    assert int(agent.predict(observation)[0]) == best


@pytest.mark.parametrize(("form", "there"), [("scores", TopKScores), ("pick", PickOne)])
def test_wrap__environment_in_a_form__is_left_in_its_own_and_refused_in_another(form: str, there: Any) -> None:
    env = there(toy())

    assert Sb3Agent("PPO", action_form=form).wrap(env) is env
    for other in {"subset", "multibinary", "scores", "pick"} - {form}:
        with pytest.raises(
            SettingError, match=f"action_form is '{other}': .* the environment without {there.__name__}"
        ):
            Sb3Agent("PPO", action_form=other).wrap(env)


def test_sb3_agent__learned__chooses_well_from_any_number_of_rows() -> None:
    env = multibinary()
    agent = Sb3Agent("PPO").learn(env, episodes=40, seed=0)
    observation = rows(1000)
    action, _ = agent.predict(observation)
    worth = observation[:, 0] - observation[:, 1]

    assert mean_reward(agent, env) > 1.4
    assert action.sum() == SIZE
    assert worth[action == 1].mean() > np.quantile(worth, 0.99)


def test_sb3_agent__learning_and_loading__leave_the_global_generators_alone(tmp_path: Path) -> None:
    def states() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    before = states()
    agent = Sb3Agent("PPO").learn(multibinary(), episodes=2, seed=0)
    agent.save(tmp_path)
    Sb3Agent.load(tmp_path)

    assert states() == before


def test_sb3_agent__same_seed__learns_the_same() -> None:
    scores = [Sb3Agent("PPO").learn(multibinary(), 4, seed).model.policy.scores(rows(5)) for seed in (3, 3, 4)]

    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


@pytest.mark.parametrize(
    ("name", "episodes", "given", "expected"),
    [
        ("PPO", 10, {}, {"n_steps": 40, "batch_size": 40}),
        ("PPO", 25, {}, {"n_steps": 50, "batch_size": 50}),
        ("PPO", 2, {}, {"n_steps": 8, "batch_size": 8}),
        ("PPO", 2, {"n_steps": 4, "batch_size": 2, "gamma": 0.5}, {"n_steps": 4, "batch_size": 2, "gamma": 0.5}),
        ("MaskablePPO", 2, {}, {"n_steps": 24, "batch_size": 24, "gamma": 0.9}),
        ("SAC", 2, {}, {"buffer_size": 8, "batch_size": 64, "gamma": 0.0}),
        ("SAC", 2, {"buffer_size": 5, "n_steps": 3}, {"buffer_size": 5, "n_steps": 3, "batch_size": 64}),
    ],
)
def test_sb3_agent__length_of_the_run__fits_what_nobody_set(
    name: str, episodes: int, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    model = Sb3Agent(name, **given).learn(toy(), episodes, seed=0).model
    steps = episodes * HORIZON * (SIZE if name == "MaskablePPO" else 1)

    assert {key: getattr(model, key) for key in expected} == expected
    assert model.num_timesteps == steps


def test_sb3_agent__progress__tells_the_return_of_each_episode() -> None:
    env, told = multibinary(), []
    Sb3Agent("PPO").learn(env, 3, seed=0, progress=lambda number, total: told.append((number, total)))
    rewards = np.reshape(env.rewards, (3, HORIZON))

    assert told == [(1, sum(rewards[0])), (2, sum(rewards[1])), (3, sum(rewards[2]))]


def test_sb3_agent__algorithm_that_turns_gradients_off__does_not_for_the_language_model(embedded_env: Any) -> None:
    told: list[float] = []
    Sb3Agent("ARS", n_delta=1).learn(embedded_env(), 1, seed=0, progress=lambda number, total: told.append(total))

    assert len(told) >= 2
    assert any(told)


def test_sb3_agent__learning__makes_no_log_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SB3_LOGDIR", str(tmp_path / "logs"))
    Sb3Agent("PPO").learn(multibinary(), 1, seed=0)

    assert list(tmp_path.iterdir()) == []


def test_sb3_agent__after_learning__goes_to_other_processes_without_the_environment() -> None:
    agent = Sb3Agent("A2C").learn(multibinary(), 1, seed=0)
    sent = pickle.loads(pickle.dumps(agent))

    assert agent.model.env is None
    np.testing.assert_array_equal(sent.predict(rows(9))[0], agent.predict(rows(9))[0])


def test_sb3_agent__policy_kwargs__are_passed_on() -> None:
    agent = Sb3Agent("PPO", policy_kwargs={"net_arch": [6]}).learn(multibinary(), 1, seed=0)

    assert agent.model.policy.action_net.layers[0].weight.shape == (6, NUM_FEATURES)
    assert agent.predict(rows(50))[0].sum() == SIZE


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("PPQ", {}, "did you mean 'PPO'"),
        ("HerReplayBuffer", {}, "no algorithm is called"),
        ("PPO", {"gama": 0.9}, "no hyperparameter 'gama': did you mean 'gamma'"),
        ("PPO", {"seed": 3}, "no hyperparameter 'seed'"),
        ("PPO", {"learning_rate": math.nan}, "expected plain data"),
        ("PPO", {"policy_kwargs": {"activation_fn": torch.nn.SiLU}}, "expected plain data"),
    ],
)
def test_sb3_agent__unknown_or_unfit_setting__is_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Sb3Agent(name, **settings)


def test_sb3_agent__not_learned__says_what_to_do(tmp_path: Path) -> None:
    agent = Sb3Agent("PPO")
    for use in (lambda: agent.predict(rows(4)), lambda: agent.action_space, lambda: agent.save(tmp_path)):
        with pytest.raises(SettingError, match="has not learned yet"):
            use()


def test_sb3_agent__folder_that_cannot_be_made__is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        Sb3Agent("PPO").learn(multibinary(), 1, seed=0).save(tmp_path / "file" / "selector")


@pytest.mark.parametrize(("num_candidates", "size"), [(128, 80), ("all", 100)], ids=["large", "more than there are"])
def test_load__batches_larger_than_any_layer__takes_as_many(num_candidates: Any, size: int, tmp_path: Path) -> None:
    def env() -> RaiseSelectEnv:
        settings = {"num_candidates": num_candidates, "batch_size": size, "horizon": 2}
        return toy_env(size - 20 if num_candidates == "all" else 200, **settings)

    agent = Sb3Agent("PPO", policy_kwargs={"net_arch": [8]}).learn(env(), 1, seed=0)
    agent.save(tmp_path / "selector")
    expected = run_episode(env(), agent, seed=0, name="a").actions

    assert len(expected[0]) == min(size, len(env().assets.pool))
    for loaded in (Sb3Agent.load(tmp_path / "selector"), Sb3Agent("PPO", load=saved_by_sb3(agent, tmp_path))):
        assert run_episode(env(), loaded, seed=0, name="a").actions == expected


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "8", None])
def test_load__subsets_of_no_number_of_rows__is_a_record_error(size: Any, tmp_path: Path) -> None:
    Sb3Agent("PPO").learn(multibinary(), 1, seed=0).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "subset_size": size}))
    with pytest.raises(RecordError, match=f"its subsets are to have {size} rows"):
        Sb3Agent.load(tmp_path)


@pytest.mark.parametrize(("name", "loads"), [("PPO", True), ("MaskablePPO", True), ("SAC", False)])
def test_load__learned_on_a_very_large_pool__needs_no_room_for_it(name: str, loads: bool, tmp_path: Path) -> None:
    agent = Sb3Agent(name).learn(toy(), 1, seed=0)
    agent.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_candidates": 50_000_000}))
    if loads:
        assert acts(Sb3Agent.load(tmp_path), seed=9) == acts(agent, seed=9)
    else:
        with pytest.raises(RecordError, match=r"its observations have shape \(50000000, 39\)"):
            Sb3Agent.load(tmp_path)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((10**9, 39), "its observations have shape"), ((1, 10**8), "its observations have"), ((2, 10**6), "wide")],
)
def test_load__observations_that_none_could_learn_on__is_a_record_error(
    shape: tuple[int, int], words: str, tmp_path: Path
) -> None:
    Sb3Agent("PPO").learn(multibinary(), 1, seed=0).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    sizes = dict(zip(("num_candidates", "num_features"), shape, strict=True))
    (tmp_path / "config.json").write_text(json.dumps({**config, **sizes}))
    with pytest.raises(RecordError, match=f"not a selector that can be read: .*{words}"):
        Sb3Agent.load(tmp_path)


@pytest.mark.parametrize(
    "broken", ["missing", "not json", "list", "nested", "other agent", "old", "no field", "no weights", "wrong weights"]
)
def test_load__broken_folder__is_a_record_error(broken: str, tmp_path: Path) -> None:
    Sb3Agent("PPO").learn(multibinary(), 1, seed=0).save(tmp_path)
    config_file, weights_file = tmp_path / "config.json", tmp_path / "model.safetensors"
    config = json.loads(config_file.read_text())
    if broken == "missing":
        config_file.unlink()
    elif broken == "not json":
        config_file.write_text("{")
    elif broken == "list":
        config_file.write_text("[]")
    elif broken == "nested":
        config_file.write_text("[" * 100_000)
    elif broken == "old":
        config_file.write_text(json.dumps({**config, "features": {"names": [], "version": 0}}))
    elif broken == "other agent":
        config_file.write_text(json.dumps({**config, "agent": "raise_fork"}))
    elif broken == "no field":
        config_file.write_text(json.dumps({"agent": "sb3:PPO"}))
    elif broken == "no weights":
        weights_file.write_bytes(b"")
    else:
        config_file.write_text(json.dumps({**config, "num_features": 4}))

    with pytest.raises(RecordError, match="not a selector that can be read"):
        Sb3Agent.load(tmp_path)


@pytest.mark.parametrize(("make", "form"), [(multibinary, "subset"), (boxed, "scores"), (discrete, "pick")])
def test_fit_wrapper__action_space__decides(make: Any, form: str) -> None:
    model, env = SimpleNamespace(action_space=make().action_space), toy()

    assert fit_wrapper(env, model).action_space == model.action_space
    assert Sb3Agent("PPO", action_form=form).wrap(env).action_space == model.action_space
    if form == "subset":
        assert fit_wrapper(env, model) is env


def test_fit_wrapper__agent_without_action_space__leaves_the_environment() -> None:
    env = multibinary()

    assert fit_wrapper(env, object()) is env


def test_fit_wrapper__other_action_space__is_refused() -> None:
    with pytest.raises(SettingError, match="fits no wrapper"):
        fit_wrapper(multibinary(), SimpleNamespace(action_space=spaces.Text(3)))  # type: ignore[arg-type]


# Models that SB3 saved itself


def saved_by_sb3(agent: Sb3Agent, folder: Path) -> Path:
    agent.model.save(folder / "model.zip")
    return folder / "model.zip"


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, forms in ALL_CLASSES.items() for form in forms])
def test_load__model_saved_by_sb3__acts_as_before_with_nothing_else_said(name: str, form: str, tmp_path: Path) -> None:
    agent = Sb3Agent(name, action_form=form).learn(toy(), 1, seed=1)
    loaded = Sb3Agent(name, load=saved_by_sb3(agent, tmp_path))

    assert loaded.action_form == form
    assert acts(loaded, seed=9) == acts(agent, seed=9)


def test_load__sb3s_own_policy__is_told_by_the_weights(tmp_path: Path) -> None:
    model = PPO("MlpPolicy", Sb3Agent("PPO", action_form="scores").wrap(toy()), device="cpu", n_steps=8, batch_size=8)
    model.learn(8)
    model.save(tmp_path / "ppo.zip")
    observation = toy().reset(seed=0)[0]
    loaded = [Sb3Agent("PPO", load=tmp_path / "ppo.zip", policy=policy) for policy in (None, "MlpPolicy")]

    for agent in loaded:
        assert (agent.policy, agent.action_form) == ("MlpPolicy", "scores")
        np.testing.assert_array_equal(agent.predict(observation)[0], model.predict(observation, deterministic=True)[0])


@pytest.mark.parametrize(("name", "settings"), [("PPO", {}), ("MaskablePPO", {}), ("ARS", {"zero_policy": False})])
def test_learn__loaded_model__goes_on_from_its_weights(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    agent = Sb3Agent(name).learn(toy(), 2, seed=1)
    path = saved_by_sb3(agent, tmp_path)
    still = Sb3Agent(name, load=path, learning_rate=0.0, **settings).learn(toy(), 2, seed=5)
    moved = Sb3Agent(name, load=path, **settings).learn(toy(), 4, seed=5)
    weights, after = agent.model.policy.state_dict(), moved.model.policy.state_dict()

    torch.testing.assert_close(still.model.policy.state_dict(), weights, rtol=0, atol=0)
    assert any(not torch.equal(after[key], weights[key]) for key in weights)


def test_learn__again__goes_on_from_what_was_learned() -> None:
    agent = Sb3Agent("PPO").learn(multibinary(), 4, seed=1)
    before = agent.model.policy.scores(rows(5))
    agent.hyperparameters = {"learning_rate": 0.0}
    agent.learn(multibinary(), 4, seed=2)

    torch.testing.assert_close(agent.model.policy.scores(rows(5)), before, rtol=0, atol=0)


def test_load__policy_settings__are_those_of_the_file_unless_given(tmp_path: Path) -> None:
    agent = Sb3Agent("PPO", policy_kwargs={"net_arch": [6]}).learn(toy(), 1, seed=0)
    path = saved_by_sb3(agent, tmp_path)
    loaded = Sb3Agent("PPO", load=path)
    loaded.save(tmp_path / "selector")

    assert loaded.model.policy.action_net.layers[0].weight.shape == (6, 39)
    assert acts(Sb3Agent.load(tmp_path / "selector"), seed=9) == acts(agent, seed=9)
    with pytest.raises(RecordError, match=r"model\.zip: .* SubsetPolicy: .* shape \(6, 39\), and \(7, 39\)"):
        Sb3Agent("PPO", load=path, policy_kwargs={"net_arch": [7]})
    with pytest.raises(RecordError, match=r"with ActorCriticPolicy: log_std is missing\. Name the algorithm"):
        Sb3Agent("PPO", load=path, policy="MlpPolicy", action_form="scores")
    with pytest.raises(RecordError, match="not those of sb3:PPO in the form 'scores'"):
        Sb3Agent("PPO", load=path, action_form="scores")
    with pytest.raises(RecordError, match=r"cannot be built with policy_kwargs .*net_ark.*unexpected keyword"):
        Sb3Agent("PPO", load=path, policy_kwargs={"net_ark": [6]})


def test_load__model_of_another_algorithm__is_refused(tmp_path: Path) -> None:
    path = saved_by_sb3(Sb3Agent("SAC").learn(toy(), 1, seed=0), tmp_path)
    with pytest.raises(RecordError, match=r"sb3:TD3 cannot be built .* Was it another algorithm"):
        Sb3Agent("TD3", load=path)
    with pytest.raises(SettingError, match="sb3:DQN cannot act in the form 'scores': Known: pick"):
        Sb3Agent("DQN", load=path)


@pytest.mark.parametrize(("name", "policy"), [("PPO", "MlpPolicy"), ("MaskablePPO", "MlpPolicy"), ("ARS", "MlpPolicy")])
def test_policy__one_of_sb3s_own__learns_saves_and_loads(name: str, policy: str, tmp_path: Path) -> None:
    agent = Sb3Agent(name, policy=policy).learn(toy(), 1, seed=0)
    agent.save(tmp_path / "selector")
    loaded = Sb3Agent.load(tmp_path / "selector")

    assert loaded.policy == policy
    assert acts(loaded, seed=9) == acts(agent, seed=9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "MlpPolice"}, "PPO has no policy 'MlpPolice': did you mean 'MlpPolicy'"),
        ({"policy": "CnnPolicy"}, "PPO has no policy 'CnnPolicy'"),
        ({"policy": "MlpPolicy", "action_form": "subset"}, "cannot act in the form 'subset' with MlpPolicy"),
    ],
)
def test_policy__that_does_not_fit__is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Sb3Agent("PPO", **settings)


def test_sb3_agent__other_number_of_candidates__is_refused_where_the_network_is_flat() -> None:
    wider = toy_env(num_candidates=NUM_ROWS + 3, num_classes=SIZE, batch_size=SIZE, horizon=HORIZON)
    flat, row_wise = (Sb3Agent(name).learn(toy(), 1, seed=0) for name in ("SAC", "PPO"))
    for use in (lambda: run_episode(wider, flat, seed=0, name="flat"), lambda: flat.learn(wider, 1)):
        with pytest.raises(SettingError, match=r"learned on observations of shape \(12, 39\), .* have \(15, 39\)"):
            use()

    assert len(run_episode(wider, row_wise, seed=0, name="rows").actions) == HORIZON


def test_check__what_the_model_could_not_read_or_never_learned__is_told_by_the_settings_alone() -> None:
    flat, row_wise = (Sb3Agent(name).learn(toy(), 1, seed=0) for name in ("SAC", "PPO"))
    sizes = {"num_classes": SIZE, "batch_size": SIZE}
    same, wider = (EnvConfig(num_candidates=number, **sizes) for number in (NUM_ROWS, NUM_ROWS + 3))
    for agent, config, episodes in ((flat, same, 0), (row_wise, wider, 2), (Sb3Agent("A2C"), same, 2)):
        agent.check(config, toy_pool(), episodes)

    for episodes in (0, 2):
        with pytest.raises(SettingError, match=r"learned on observations of shape \(12, 39\), .* have \(15, 39\)"):
            flat.check(wider, toy_pool(), episodes)
    with pytest.raises(SettingError, match="has learned nothing yet, and is to learn for 0 episodes"):
        Sb3Agent("A2C").check(same, toy_pool(), 0)


def toy_of_batches(size: int) -> gym.Env[np.ndarray, np.ndarray]:
    return toy_env(num_candidates=NUM_ROWS, num_classes=SIZE, batch_size=size, horizon=HORIZON)


@pytest.mark.parametrize("name", ["PPO", "A2C"])
def test_begin__another_batch_size_than_in_learning__takes_as_many_rows(name: str, tmp_path: Path) -> None:
    agent = Sb3Agent(name).learn(toy(), 1, seed=0)
    agent.save(tmp_path / "selector")
    loaded = (Sb3Agent.load(tmp_path / "selector"), Sb3Agent(name, load=saved_by_sb3(agent, tmp_path)))

    for own in (agent, *loaded):
        for size in (SIZE + 2, SIZE - 1, SIZE):
            for deterministic in (True, False):
                record = run_episode(toy_of_batches(size), own, seed=0, name=name, deterministic=deterministic)
                assert [len(chosen) for chosen in record.actions] == [size] * HORIZON
