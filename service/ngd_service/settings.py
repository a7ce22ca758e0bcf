"""How the service is set up. The only module that reads the environment: NGD_HOST, NGD_PORT, NGD_HOME ..."""

import ipaddress
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, SecretStr, ValidationError, create_model, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from ngd_service.errors import StartupError
from ngd_service.failpoint import Place
from ngd_service.home import DATABASE, RUNS
from ngd_service.setting_types import OptionalPath, Origin, SomePath, WithoutPassword

if TYPE_CHECKING:
    from ngd_service.dispatchers.base import Dispatcher

__all__ = [
    "ClientSettings",
    "Settings",
    "load_client_settings",
    "load_common_settings",
    "load_settings",
    "settings_class",
]

DAY_S = 86_400.0
DEFAULT_PORTS = {"http": 80, "https": 443}
DRIVER = ("-m", "ngd_workers.launch")
Seconds = Annotated[float, Field(allow_inf_nan=False)]
Loaded = TypeVar("Loaded", bound=BaseSettings)


class Settings(BaseSettings):
    """The settings that belong to no single dispatcher; each is read from the variable NGD_<NAME>."""

    model_config = SettingsConfigDict(env_prefix="NGD_", frozen=True, validate_default=True)

    host: str = Field("127.0.0.1", description="Address to listen on; any but loopback needs api_keys_dir.")
    port: int = Field(8000, ge=0, le=65535, description="0: any free port.")
    home: SomePath = Field(Path("~/.ngd"), description="Folder of runs and of the default database.")
    database_url: str = Field("", description="SQLAlchemy URL of SQLite or PostgreSQL; empty: a file in home.")
    data_dir: OptionalPath = Field(None, description="The folder that a relative data directory in a spec starts from.")
    api_keys_dir: OptionalPath = Field(
        None, description="Folder with a file per API key, named for its owner; unset: no keys, loopback only."
    )
    public_url: WithoutPassword = Field(
        "", description="Where people reach the service; empty: the address it listens on."
    )
    signing_key_file: OptionalPath = Field(
        None, description="32 bytes, or 64 hex digits, that all controllers of a database share; unset: made in home."
    )
    worker_url: Origin = Field("", description="Where workers report to; empty: where it listens.")
    dispatcher: str = Field(
        "local",
        description="Who runs the attempts: this machine, a Ray cluster, or a RayJob each; or package.module:Class.",
    )
    runs_dir: OptionalPath = Field(
        None,
        description="Dispatchers on other machines: folder of runs that workers see as the same path; empty: in home.",
    )
    unreachable_s: Seconds = Field(
        600.0,
        gt=0,
        le=7 * DAY_S,
        description="Seconds for which a dispatcher may be silent; then the attempt counts as lost.",
    )
    function_modules: Annotated[tuple[str, ...] | None, NoDecode] = Field(
        None,
        description="Modules, comma-separated, whose functions a job may name, with what lies below them; unset: any.",
    )
    secrets_dir: OptionalPath = Field(
        None,
        description="Where the workers run: folder with a file per secret, which any job may name; unset: none.",
    )
    start_within_s: Seconds = Field(
        DAY_S, gt=0, le=90 * DAY_S, description="Seconds in which an attempt's workers have to report; then it fails."
    )
    max_log_mib: int = Field(256, ge=2, le=1 << 20, description="MiB on disk that each log keeps: its newest.")
    max_running_jobs: int = Field(1, ge=1, description="Jobs that run at once; the rest wait in order of creation.")
    tick_s: Seconds = Field(1.0, gt=0, le=60, description="Seconds between two looks at the running jobs.")
    lease_s: Seconds = Field(
        30.0, gt=0, le=3600, description="Seconds after which another controller may take over a job."
    )
    retry_backoff_s: Seconds = Field(
        2.0, ge=0, le=300, description="Wait before attempt 2; doubles each time, up to 300."
    )
    max_failed_starts: int = Field(
        10, ge=1, description="Attempts in a row that end before their workers report; then the job has failed."
    )
    start_backoff_s: Seconds = Field(
        15.0, ge=0, le=300, description="Wait after the first of them; doubles each time, up to 300."
    )
    cancel_grace_s: Seconds = Field(30.0, ge=0, le=DAY_S, description="Seconds a cancelled job has to stop by itself.")
    interrupt_grace_s: Seconds = Field(10.0, ge=0, le=3600, description="Seconds between SIGINT and SIGKILL.")
    max_connections: int = Field(
        500, ge=16, le=100_000, description="Sockets at once; never more than half of the process's file descriptors."
    )
    arrival_s: Seconds = Field(
        30.0,
        gt=0,
        le=3600,
        description="Seconds within which a request has to arrive whole, unless 16 KiB arrive in each.",
    )
    driver_command: Annotated[Annotated[tuple[str, ...], Field(min_length=1)] | None, NoDecode] = Field(
        None,
        description="Command of an attempt, a JSON list; its folder is appended. Unset: python -m ngd_workers.launch.",
    )
    failpoint: Place | None = Field(None, description="For tests: where the controller kills itself.")

    @field_validator("function_modules", mode="before")
    @classmethod
    def _modules(cls, given: object) -> object:
        if not isinstance(given, str):
            return given
        names = tuple(name.strip() for name in given.split(",") if name.strip())
        wrong = next((name for name in names if not all(part.isidentifier() for part in name.split("."))), None)
        if wrong is not None:
            raise ValueError(
                f"function_modules (NGD_FUNCTION_MODULES) must be names of modules with commas between, got {wrong!r}; "
                "write for example: mine.models,mine.data"
            )
        return names or None

    @field_validator("driver_command", mode="before")
    @classmethod
    def _words(cls, command: object) -> object:
        if not isinstance(command, str):
            return command
        try:
            return tuple(json.loads(command))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"driver_command (NGD_DRIVER_COMMAND) must be a JSON list of texts, got {command!r}; "
                f"its default is {json.dumps(['python', *DRIVER])}"
            ) from error

    @field_validator("host")
    @classmethod
    def _address(cls, host: str) -> str:
        if host == "localhost":
            return "127.0.0.1"
        try:
            return str(ipaddress.ip_address(host))
        except ValueError as error:
            raise ValueError(
                f"host (NGD_HOST) must be an IP address of this machine, such as 127.0.0.1, 0.0.0.0 (each of them) or "
                f"::, or localhost, got {host!r}"
            ) from error

    @field_validator("public_url")
    @classmethod
    def _origin(cls, url: str) -> str:
        if not url:
            return url
        address = _split(url)
        if address is None or address.path.strip("/") or address.query or address.fragment:
            raise ValueError(
                "public_url (NGD_PUBLIC_URL) must be scheme, host and port alone, such as https://ngd.example.com, "
                f"got {url!r}; the service can't live below a path"
            )
        name = f"[{address.hostname}]" if ":" in (address.hostname or "") else address.hostname
        is_default = address.port in (None, DEFAULT_PORTS[address.scheme])  # browsers leave it out of Origin and Host
        return f"{address.scheme}://{name}" if is_default else f"{address.scheme}://{name}:{address.port}"

    @model_validator(mode="after")
    def _keys_beyond_loopback(self) -> Self:
        if self.api_keys_dir is None and not self.is_loopback:
            raise ValueError(
                f"host (NGD_HOST) must be a loopback address (127.0.0.1, ::1 or localhost) while there are no API "
                f"keys, got {self.host!r}: give a folder of keys with NGD_API_KEYS_DIR, or use an SSH tunnel from "
                "elsewhere"
            )
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        return ipaddress.ip_address(self.host).is_loopback

    @property
    def url(self) -> str:
        """Where the service answers on this machine."""
        address = ipaddress.ip_address(self.host)
        if address.is_unspecified:  # every address of the machine, loopback among them
            address = ipaddress.ip_address("::1" if address.version == 6 else "127.0.0.1")
        return f"http://[{address}]:{self.port}" if address.version == 6 else f"http://{address}:{self.port}"

    @property
    def people_url(self) -> str:
        """Where people reach the service."""
        return self.public_url or self.url

    @property
    def dispatcher_class(self) -> "type[Dispatcher[Any]]":
        """The class of the dispatcher; its settings are attributes of load_settings' result."""
        from ngd_service.dispatchers import dispatcher_named

        return dispatcher_named(self.dispatcher)

    @property
    def resolved_worker_url(self) -> str:
        return self.worker_url or self.url

    @property
    def resolved_driver_command(self) -> tuple[str, ...]:
        """What an attempt's folder is appended to; another machine has its own python."""
        return self.driver_command or (sys.executable if self.dispatcher_class.owns_processes else "python", *DRIVER)

    @property
    def resolved_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.home / DATABASE}"

    @property
    def resolved_runs_dir(self) -> Path:
        return self.runs_dir or self.home / RUNS


class _WithDispatcher(Settings):
    """Settings together with those of every dispatcher: they have to fit the one that is chosen."""

    @model_validator(mode="after")
    def _workers_find_it(self) -> Self:
        is_elsewhere = not self.dispatcher_class.owns_processes
        if is_elsewhere and not self.worker_url and ipaddress.ip_address(self.host).is_unspecified:
            raise ValueError(
                f"the dispatcher {self.dispatcher} needs worker_url (NGD_WORKER_URL) while the service listens on "
                f"every address ({self.host}): where its workers, on other machines, report to"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_dispatcher(self) -> Self:
        from ngd_service.dispatchers import DISPATCHERS

        if self.dispatcher_class.owns_processes and self.runs_dir is not None:
            others = " and ".join(name for name, one in DISPATCHERS.items() if not one.owns_processes)
            raise ValueError(
                f"runs_dir (NGD_RUNS_DIR) is for the dispatchers {others}, got {str(self.runs_dir)!r} with "
                f"{self.dispatcher}, whose runs lie in NGD_HOME with their processes' lock; leave it out"
            )
        read = self.dispatcher_class.settings_class.model_fields
        for dispatcher, one in DISPATCHERS.items():
            for name in one.settings_class.model_fields:
                if name not in read and (value := getattr(self, name)):
                    raise ValueError(
                        f"{name} (NGD_{name.upper()}) is for the dispatcher {dispatcher}, got {str(value)!r} with "
                        f"{self.dispatcher}; leave it out, or set NGD_DISPATCHER={dispatcher}"
                    )
        self.dispatcher_class.check(self)
        return self


class _Choice(BaseSettings):
    """The one setting that tells which others there are."""

    model_config = SettingsConfigDict(env_prefix="NGD_", extra="ignore")

    dispatcher: str = "local"


class ClientSettings(BaseSettings):
    """What the commands that talk to a service read: NGD_URL, and NGD_API_KEY or NGD_API_KEY_FILE."""

    model_config = SettingsConfigDict(env_prefix="NGD_", frozen=True, env_ignore_empty=True)

    url: str | None = Field(None, description="Where the service is; unset: where NGD_HOST and NGD_PORT say.")
    api_key: SecretStr | None = Field(None, description="The caller's API key.")
    api_key_file: Path | None = Field(None, description="File that holds the API key.")

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if self.api_key is not None and self.api_key_file is not None:
            raise ValueError("NGD_API_KEY and NGD_API_KEY_FILE are both set, and only one can count; unset the other")
        return self


def settings_class(dispatcher: str = "local") -> type[Settings]:
    """Returns the class of all settings: the common ones and those of each dispatcher.

    dispatcher: the chosen one, whose settings count too if it is another package's. Raises: StartupError.
    """
    from ngd_service.dispatchers import DISPATCHERS, dispatcher_named

    known = dict(DISPATCHERS)
    if ":" in dispatcher:
        known[dispatcher] = dispatcher_named(dispatcher)
    bases: tuple[Any, ...] = (_WithDispatcher, *dict.fromkeys(one.settings_class for one in known.values()))
    fields: dict[str, Any] = {"dispatcher": (Literal[tuple(known)], Settings.model_fields["dispatcher"])}
    return create_model("Settings", __base__=bases, **fields)


def load_settings(**given: Any) -> Settings:
    """Returns the settings; `given` wins over the environment. Raises: StartupError with one sentence per setting."""
    return _load(settings_class(given.get("dispatcher") or _Choice().dispatcher), given)


def load_common_settings() -> Settings:
    """Returns the settings without those of dispatchers, of which it imports none. Raises: StartupError."""
    return _load(Settings, {})


def load_client_settings() -> ClientSettings:
    """Returns where the service is and the caller's key. Raises: StartupError."""
    return _load(ClientSettings, {})


def _load(kind: type[Loaded], given: dict[str, Any]) -> Loaded:
    try:
        return kind(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise StartupError("; ".join(_sentence(item) for item in error.errors())) from error


def _sentence(item: Any) -> str:
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "value_error":
        return message
    name = str(item["loc"][0])
    message = message[0].lower() + message[1:]
    return f"setting {name} (NGD_{name.upper()}): {message}, got {item['input']!r}"


def _split(url: str) -> SplitResult | None:
    """Returns the parts of an http address; None: `url` is no such address."""
    try:
        address = urlsplit(url)
        is_address = address.scheme in ("http", "https") and bool(address.hostname) and (address.port or 1) > 0
    except ValueError:
        return None
    return address if is_address else None
