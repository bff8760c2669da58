#include "cores.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>
#include <thread>

#include "core_set.h"

#ifdef __APPLE__
#include <sys/sysctl.h>
#endif

namespace moefast {
namespace {

// The lesser of two numbers of cores, where 0 says nothing.
int lesser(int a, int b) {
  return a == 0 || b == 0 ? std::max(a, b) : std::min(a, b);
}

int cores_of(double quota, double period) {
  if (!(quota > 0 && period > 0)) {
    return 0;  // "-1": none
  }
  return static_cast<int>(std::ceil(std::min(quota / period, 1e6)));
}

// Version 2: "max 100000" or "150000 100000".
int unified_quota(const std::string& folder) {
  std::ifstream file(folder + "/cpu.max");
  double quota = 0, period = 0;
  return file >> quota >> period ? cores_of(quota, period) : 0;
}

// Version 1: one number per file.
int split_quota(const std::string& folder) {
  std::ifstream quota_file(folder + "/cpu.cfs_quota_us");
  std::ifstream period_file(folder + "/cpu.cfs_period_us");
  double quota = 0, period = 0;
  return quota_file >> quota && period_file >> period ? cores_of(quota, period) : 0;
}

// The least quota of `path` and the groups around it. In a container the mount often shows the
// container's own group as its root although the path is the host's: folders that are not there
// have no quota, and the root is asked in any case.
template <class Quota>
int least_upwards(const std::string& mount, std::string path, Quota quota) {
  int least = quota(mount);
  while (path.size() > 1 && path[0] == '/') {
    least = lesser(least, quota(mount + path));
    path.resize(path.find_last_of('/'));
  }
  return least;
}

bool names_cpu(const std::string& controllers) {
  std::istringstream list(controllers);
  for (std::string name; std::getline(list, name, ',');) {
    if (name == "cpu") {
      return true;
    }
  }
  return false;
}

int affinity_cores() {
#ifdef __linux__
  return CoreSet::allowed().count();
#else
  return 0;
#endif
}

int machine_cores() {
#ifdef __APPLE__
  // Performance cores only: work is handed out piece by piece, and a run would end with the wait
  // for an efficiency core's last one.
  int cores = 0;
  size_t size = sizeof cores;
  if (sysctlbyname("hw.perflevel0.logicalcpu", &cores, &size, nullptr, 0) == 0 && cores > 0) {
    return cores;
  }
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

#ifdef __linux__
std::string text_of(const char* path) {
  std::ostringstream text;
  std::ifstream file(path);
  if (file) {
    text << file.rdbuf();
  }
  return text.str();
}
#endif

}  // namespace

int quota_cores(const std::string& membership, const std::string& root) {
  int least = 0;
  std::istringstream lines(membership);
  for (std::string line;
       std::getline(lines, line);) {  // "4:cpu,cpuacct:/some/group" or "0::/group"
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) {
      continue;
    }
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
    if (controllers.empty()) {
      least = lesser(least, least_upwards(root, path, unified_quota));
      least = lesser(least, least_upwards(root + "/unified", path, unified_quota));
    } else if (names_cpu(controllers)) {
      least = lesser(least, least_upwards(root + "/" + controllers, path, split_quota));
      least = lesser(least, least_upwards(root + "/cpu", path, split_quota));
    }
  }
  return least;
}

int usable_cores() {
  int cores = lesser(machine_cores(), affinity_cores());
#ifdef __linux__
  cores = lesser(cores, quota_cores(text_of("/proc/self/cgroup"), "/sys/fs/cgroup"));
#endif
  return std::max(cores, 1);
}

}  // namespace moefast
