// The number of usable cores, from the affinity mask and from cgroups of either version.
#include "cores.h"

#include <stdlib.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <thread>

#include "expect.h"

#ifdef __linux__
#include <sched.h>
#endif

using namespace moefast;
using namespace moefast::testing;

namespace {

// Folders and files that stand for /sys/fs/cgroup, until the end of its scope.
class Cgroups {
 public:
  Cgroups() {
    std::string name = (std::filesystem::temp_directory_path() / "cgroupsXXXXXX").string();
    root_ = mkdtemp(name.data());
  }
  ~Cgroups() { std::filesystem::remove_all(root_); }

  const std::string& root() const { return root_; }

  void write(const std::string& path, const std::string& text) const {
    const std::filesystem::path file = root_ + "/" + path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text << '\n';
  }

  void quota(const std::string& group, const char* quota, const char* period) const {
    write(group + "/cpu.cfs_quota_us", quota);
    write(group + "/cpu.cfs_period_us", period);
  }

 private:
  std::string root_;
};

void at_least_one_core() {
  const int cores = usable_cores();
  EXPECT(cores >= 1);
  EXPECT(cores <= static_cast<int>(std::thread::hardware_concurrency()));
}

void no_more_than_the_affinity_mask() {
#ifdef __linux__
  cpu_set_t former;
  if (sched_getaffinity(0, sizeof former, &former) != 0) {
    return;  // a machine with more cores than this mask has room for
  }
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(core, &former)) {
      cpu_set_t one;
      CPU_ZERO(&one);
      CPU_SET(core, &one);
      EXPECT(sched_setaffinity(0, sizeof one, &one) == 0);
      EXPECT(usable_cores() == 1);
      break;
    }
  }
  sched_setaffinity(0, sizeof former, &former);
#endif
}

void no_quota() {
  const Cgroups none;
  EXPECT(quota_cores("", none.root()) == 0);
  EXPECT(quota_cores("0::/\n", none.root()) == 0);
  EXPECT(quota_cores("nonsense\n::\n:\n1:cpu:\n0::relative\n0::/a/b\n", none.root()) == 0);
}

void version_two() {
  const Cgroups groups;
  groups.write("cpu.max", "max 100000");
  EXPECT(quota_cores("0::/\n", groups.root()) == 0);
  groups.write("a/cpu.max", "350000 100000");
  EXPECT(quota_cores("0::/a\n", groups.root()) == 4);  // rounded up
  groups.write("a/b/cpu.max", "max 100000");
  EXPECT(quota_cores("0::/a/b\n", groups.root()) == 4);  // the one around it
  groups.write("a/b/c/cpu.max", "50000 100000");
  EXPECT(quota_cores("0::/a/b/c\n", groups.root()) == 1);
  EXPECT(quota_cores("0::/elsewhere\n", groups.root()) == 0);
  // A container: its own group is mounted as the root, its path is the host's.
  groups.write("cpu.max", "200000 100000");
  EXPECT(quota_cores("0::/docker/0123\n", groups.root()) == 2);
}

void version_one() {
  const Cgroups groups;
  groups.quota("cpu,cpuacct", "-1", "100000");
  EXPECT(quota_cores("4:cpu,cpuacct:/\n", groups.root()) == 0);
  groups.quota("cpu,cpuacct/job", "250000", "100000");
  EXPECT(quota_cores("5:memory:/m\n4:cpu,cpuacct:/job\n0::/\n", groups.root()) == 3);
  EXPECT(quota_cores("4:cpuset:/job\n3:cpuacct:/job\n", groups.root()) == 0);
  groups.quota("cpu/job", "100000", "100000");
  EXPECT(quota_cores("1:cpu:/job\n", groups.root()) == 1);
  groups.quota("cpu/zero", "100000", "0");
  EXPECT(quota_cores("1:cpu:/zero\n", groups.root()) == 0);
}

void both_versions() {
  const Cgroups groups;
  groups.quota("cpu", "400000", "100000");
  groups.write("unified/job/cpu.max", "300000 100000");
  EXPECT(quota_cores("1:cpu:/\n0::/job\n", groups.root()) == 3);
}

}  // namespace

int main() {
  run_case("at_least_one_core", at_least_one_core, nullptr);
  run_case("no_more_than_the_affinity_mask", no_more_than_the_affinity_mask, nullptr);
  run_case("no_quota", no_quota, nullptr);
  run_case("version_two", version_two, nullptr);
  run_case("version_one", version_one, nullptr);
  run_case("both_versions", both_versions, nullptr);
  return verdict();
}
