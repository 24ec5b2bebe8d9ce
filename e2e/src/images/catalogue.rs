//! The images that tests use.

use super::{Base, Config, Entry, Layer, Recipe};

/// The search path that every image has in its configuration.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// busybox, and nothing else: the smallest.
pub fn busybox() -> Recipe {
    Recipe {
        name: "busybox",
        layers: vec![Layer { base: Base::Busybox, ..Layer::default() }],
        config: Config { cmd: &["sh"], env: &[PATH], ..Config::default() },
    }
}

/// busybox for a user without rights, in a folder that the image does not have.
pub fn unprivileged() -> Recipe {
    let config = Config {
        user: "app:extra",
        working_dir: "/srv/no/such",
        env: &[PATH, "FROM_IMAGE=a b=c"],
        entrypoint: &["/bin/sh", "-c"],
        cmd: &["id; pwd; env"],
        stop_signal: "SIGINT",
    };
    Recipe { name: "unprivileged", config, ..busybox() }
}

/// Three layers over busybox that add, replace and delete.
pub fn layered() -> Recipe {
    let file = |text| Entry::File(0o644, text);
    let layer = |files: &[(&'static str, Entry)]| Layer {
        files: files.iter().cloned().collect(),
        ..Layer::default()
    };
    let mut recipe = Recipe { name: "layered", ..busybox() };
    recipe.layers.extend([
        layer(&[
            ("data/kept", file("first")),
            ("data/replaced", file("first")),
            ("data/deleted", file("first")),
            ("gone/file", file("first")),
            ("opaque/below", file("first")),
            ("opaque/deep/below", file("first")),
            ("link", Entry::Link("data/replaced")),
            ("sticky", Entry::Folder(0o1777, 1000)),
        ]),
        layer(&[
            ("data/replaced", file("second")),
            ("data/deleted", Entry::Whiteout),
            ("gone", Entry::Whiteout),
            ("opaque", Entry::Opaque),
            ("opaque/above", file("second")),
        ]),
        layer(&[("data/added", Entry::File(0o4711, "third"))]),
    ]);
    recipe
}

/// busybox with a static program of ours below `/bin`.
pub fn with_program(name: &'static str, program: std::path::PathBuf) -> Recipe {
    let mut recipe = Recipe { name, ..busybox() };
    let entry = Entry::Program(program);
    recipe.layers.push(Layer { files: [("bin/bailey-probe", entry)].into(), ..Layer::default() });
    recipe
}

/// A small Debian with bash and Python.
pub fn base() -> Recipe {
    debian(
        "base",
        &["bash", "python3-minimal", "libpython3-stdlib", "procps"],
        Config { cmd: &["bash"], env: &[PATH], ..Config::default() },
    )
}

/// A web server.
pub fn nginx() -> Recipe {
    debian(
        "nginx",
        &["nginx", "busybox-static"],
        Config {
            entrypoint: &["nginx", "-g", "daemon off; error_log stderr;"],
            env: &[PATH],
            stop_signal: "SIGQUIT",
            ..Config::default()
        },
    )
}

/// A store in memory.
pub fn redis() -> Recipe {
    debian(
        "redis",
        &["redis-server", "redis-tools"],
        Config {
            entrypoint: &["redis-server", "--save", "", "--dir", "/tmp"],
            env: &[PATH],
            user: "redis",
            ..Config::default()
        },
    )
}

/// A database that makes its cluster when it is first started.
pub fn postgresql() -> Recipe {
    let start = "#!/bin/sh\nset -e\n[ -s \"$PGDATA/PG_VERSION\" ] || initdb --no-sync >/dev/null\nexec postgres -k /tmp\n";
    let mut recipe = debian(
        "postgresql",
        &["postgresql-15", "procps"],
        Config {
            entrypoint: &["/usr/local/bin/start"],
            env: &[
                "PATH=/usr/local/bin:/usr/lib/postgresql/15/bin:/usr/bin:/bin",
                "PGDATA=/var/lib/postgresql/data",
                "PGHOST=/tmp",
                "LANG=C.UTF-8",
            ],
            user: "postgres",
            stop_signal: "SIGINT",
            ..Config::default()
        },
    );
    let files = [("usr/local/bin/start", Entry::File(0o755, start))];
    recipe.layers.push(Layer { files: files.into(), ..Layer::default() });
    recipe
}

fn debian(name: &'static str, packages: &'static [&'static str], config: Config) -> Recipe {
    Recipe { name, layers: vec![Layer { base: Base::Debian(packages), ..Layer::default() }], config }
}
