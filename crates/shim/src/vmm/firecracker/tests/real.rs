//! The driver against the real programs, where they are named.

use super::*;

/// With the real programs, the real kernel and the real guest: boot, save, and two clones.
#[tokio::test]
async fn the_real_firecracker_boots_saves_and_clones() {
    let config = Config::load(None).unwrap();
    if config.firecracker.is_none() || config.jailer.is_none() {
        let line = "not run: the real Firecracker, for want of BAILEY_FIRECRACKER and BAILEY_JAILER\n";
        std::io::stderr().write_all(line.as_bytes()).unwrap();
        return;
    }
    let mut world = World::new(Mode::Good);
    let real = Firecracker::new(&config).unwrap();
    (world.driver.program, world.driver.jailer) = (real.program, real.jailer);
    world.shape =
        Shape { guest: GuestImage::find(&config.guest_dir).unwrap(), memory_bytes: 256 << 20, vcpus: 1 };
    let disks = world.disks(&"x".repeat(4096), IoLimits::default());
    let mut machine = world.launch(Origin::Boot, Some(disks)).await.unwrap();
    connect(&mut machine).await;
    drop(machine);
    let mut machine = world.launch(Origin::Template, None).await.unwrap();
    connect(&mut machine).await;
    let saved = machine.save().await.unwrap();
    drop(machine);
    for io in [IoLimits::default(), limits()] {
        let copy = |file: &File| file.try_clone().unwrap();
        let origin = Origin::Clone(Saved { memory: copy(&saved.memory), devices: copy(&saved.devices) });
        let disks = world.disks(&"x".repeat(4096), io);
        let mut machine = world.launch(origin, Some(disks)).await.unwrap();
        connect(&mut machine).await;
    }
    world.assert_nothing_is_left();
}
