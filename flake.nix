{
  description = "MaskTune: a shell in which `make notebook`, `make lab` and `make test` work";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";

  outputs = { self, nixpkgs }:
    let
      systems = [ "x86_64-linux" "aarch64-linux" ];
      forEach = make: nixpkgs.lib.genAttrs systems (system: make nixpkgs.legacyPackages.${system});
    in
    {
      # The wheels of requirements.txt bring their own CUDA and expect the usual file system; the host brings the driver.
      devShells = forEach (pkgs: {
        default = (pkgs.buildFHSEnv {
          name = "masktune";
          targetPkgs = pkgs: with pkgs; [ python312 gnumake git stdenv.cc zlib libGL glib ];
          profile = "export LD_LIBRARY_PATH=/run/opengl-driver/lib\${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}";
          runScript = "bash";
        }).env;
      });
    };
}
