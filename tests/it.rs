//! Tests against real servers. Their addresses come from the environment: `eval "$(dev/stack env)"`.

mod external;
mod mock_external;
